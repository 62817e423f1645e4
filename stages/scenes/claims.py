"""The grammar of scene captions: text to claims, claims to text, and claims checked against a scene.

Pure functions. It refuses to know who wrote a caption, or how anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from random import Random
from typing import Literal, NamedTuple

from pipeline.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    find_relation,
    is_related,
)

Kind = Literal["count", "background", "object", "size", "texture", "relation"]
KINDS: tuple[Kind, ...] = ("count", "background", "object", "size", "texture", "relation")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THINGS = "objects"  # the subject of a count of everything
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()} | {"object": THINGS}
OPPOSITES = {
    "right of": "left of",
    "below": "above",
    "around": "inside",
}  # written -> stored, with the two things swapped

DIRECTIONS = ("left of", "above")  # transitive and asymmetric
MEETINGS = ("inside", "touching")  # at most one of them holds between two things, and in one direction


class Claim(NamedTuple):
    """One atomic statement about a picture.

    >>> parse_caption("A small red circle is left of the blue star.").claims  # not one statement of the grammar
    frozenset()
    >>> sorted(claim.kind for claim in parse_caption("There is a small red circle.").claims)
    ['object', 'size']
    """

    kind: Kind
    about: str  # "red circle"; for a count "objects" or a shape; "" for the background
    value: str  # small, striped, "3", grey, left of; "" for an object
    other: str = ""  # of a relation: what `about` is related to


Parts = tuple[Claim, ...]  # of one object sentence: the object, then its size and texture as far as they are stated


@dataclass(frozen=True, kw_only=True)
class Sentence:
    text: str
    claims: tuple[Claim, ...]  # empty: outside the grammar


@dataclass(frozen=True, kw_only=True)
class ParsedCaption:
    sentences: tuple[Sentence, ...]

    @property
    def claims(self) -> frozenset[Claim]:
        return frozenset(claim for sentence in self.sentences for claim in sentence.claims)

    @property
    def unparsed(self) -> tuple[str, ...]:
        return tuple(sentence.text for sentence in self.sentences if not sentence.claims)


@dataclass(frozen=True, kw_only=True)
class ClaimCounts:
    """Counts of a caption's claims. A repeated claim counts once; a sentence outside the grammar is one false claim."""

    num_stated: int
    num_true: int
    num_found: int  # of the facts
    num_facts: int

    @property
    def precision(self) -> float:
        return self.num_true / self.num_stated if self.num_stated else 0.0

    @property
    def recall(self) -> float:
        return self.num_found / self.num_facts

    @property
    def f1(self) -> float:
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @property
    def num_false(self) -> int:
        return self.num_stated - self.num_true


def list_facts(scene: Scene) -> tuple[Claim, ...]:
    """The claims of a complete caption: count, background, things from left to right, relations between neighbours."""
    things = scene.left_to_right
    return (
        Claim("count", THINGS, str(len(things))),
        Claim("background", "", scene.background),
        *(claim for thing in things for claim in list_thing_facts(thing)),
        *(make_relation(a.name, find_relation(a, b), b.name) for a, b in pairwise(things)),
    )


def list_thing_facts(thing: Thing) -> tuple[Claim, ...]:
    return (
        Claim("object", thing.name, ""),
        Claim("size", thing.name, thing.size),
        Claim("texture", thing.name, thing.texture),
    )


def make_relation(about: str, word: str, other: str) -> Claim:
    """A relation in canonical form: right of, below and around become their opposites, touching is sorted by name."""
    if word in OPPOSITES:
        return Claim("relation", other, OPPOSITES[word], about)
    if word == "touching" and other < about:
        return Claim("relation", other, word, about)
    return Claim("relation", about, word, other)


def is_true(claim: Claim, scene: Scene) -> bool:
    """True when a claim holds for a scene, listed by `list_facts` or not."""
    things = {thing.name: thing for thing in scene.things}
    match claim.kind:
        case "background":
            return claim.value == scene.background
        case "count":
            return claim.value == str(sum(claim.about in (THINGS, thing.shape) for thing in scene.things))
        case "relation":
            a, b = things.get(claim.about), things.get(claim.other)
            return a is not None and b is not None and a is not b and is_related(a, claim.value, b)
    thing = things.get(claim.about)
    return thing is not None and claim.value in {"object": "", "size": thing.size, "texture": thing.texture}[claim.kind]


def contradicts(claim: Claim, other: Claim) -> bool:
    """True when no scene has both. Relations are in canonical form.

    >>> contradicts(Claim("size", "red ring", "small"), Claim("size", "red ring", "large"))
    True
    """
    if claim.kind != other.kind or claim == other:
        return False
    if claim.kind == "relation":
        if {claim.about, claim.other} != {other.about, other.other}:
            return False
        return {claim.value, other.value} <= {*MEETINGS} or (claim.value == other.value and claim.value in DIRECTIONS)
    return claim.about == other.about and claim.value != other.value


def is_exceeded(claim: Claim, mentions: Iterable[Parts]) -> bool:
    """True for a count that is lower than the number of things that the caption lists."""
    if claim.kind != "count":
        return False
    listed = sum(claim.about in (THINGS, mention[0].about.split()[-1]) for mention in mentions)
    return listed > int(claim.value)


def count_claims(text: str, scene: Scene) -> ClaimCounts:
    parsed = parse_caption(text)
    claims, truth = parsed.claims, list_facts(scene)
    return ClaimCounts(
        num_stated=len(claims) + len(parsed.unparsed),
        num_true=sum(is_true(claim, scene) for claim in claims),
        num_found=len(claims.intersection(truth)),
        num_facts=len(truth),
    )


def write_caption(claims: Iterable[Claim], rng: Random) -> str:
    """A caption that makes the claims in their order, details with their objects; `rng` draws the phrasing."""
    return " ".join(write_sentence(group, rng) for group in group_claims(claims))


def group_claims(claims: Iterable[Claim]) -> list[tuple[Claim, ...]]:
    """The claims by sentence: an object together with its size and texture.

    Raises:
        ValueError: a size or texture has no object.
    """
    claims = list(dict.fromkeys(claims))
    details = {(c.kind, c.about): c for c in claims if c.kind in ("size", "texture")}
    groups = []
    for claim in claims:
        if claim.kind == "object":
            own = (details.pop((kind, claim.about), None) for kind in ("size", "texture"))
            groups.append((claim, *(detail for detail in own if detail)))
        elif claim.kind not in ("size", "texture"):
            groups.append((claim,))
    if details:
        raise ValueError(f"no object claim for {next(iter(details))[1]}")
    return groups


def write_sentence(group: Sequence[Claim], rng: Random) -> str:
    """One sentence for the claims of one sentence, as `group_claims` groups them."""
    first = group[0]
    match first.kind:
        case "object":
            thing = " ".join([*(claim.value for claim in group[1:]), first.about])
            template = rng.choice(("There is {}.", "{}.", "The picture shows {}."))
            return _capitalise(template.format(f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"))
        case "count":
            count, verb = _write_count(int(first.value), first.about), "is" if first.value == "1" else "are"
            return _capitalise(rng.choice((f"There {verb} {count}.", f"{count}.", f"The picture has {count}.")))
        case "background":
            templates = ("The background is {}.", "All is on a {} background.", "A {} background.")
            return rng.choice(templates).format(first.value)
        case "relation":
            return _write_relation(first, rng)
    raise ValueError(f"a sentence cannot begin with {first}")


def _write_relation(claim: Claim, rng: Random) -> str:
    about, word, other = claim.about, claim.value, claim.other
    if rng.random() < 0.3:
        turned = {stored: written for written, stored in OPPOSITES.items()}
        about, word, other = other, turned.get(word, word), about
    return f"The {about} is {word} the {other}."


def _write_count(number: int, about: str) -> str:
    if number == 1:
        return f"one {'object' if about == THINGS else about}"
    return f"{NUMBERS[number]} {PLURALS.get(about, about)}"


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def parse_caption(text: str) -> ParsedCaption:
    return ParsedCaption(sentences=tuple(Sentence(text=s, claims=_parse_sentence(s)) for s in split_sentences(text)))


def split_sentences(text: str) -> list[str]:
    return [s for part in re.split(r"(?<=[.!?])\s+|\n", text) if (s := part.strip())]


@cache
def _compile_grammar() -> tuple[tuple[Kind, re.Pattern[str]], ...]:
    name = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    sizes, textures = "|".join(SIZES), "|".join(TEXTURES)
    thing = rf"an? (?:(?P<size>{sizes}) )?(?:(?P<texture>{textures}) )?(?P<about>{name})"
    counted = "|".join(["objects?", *(f"{shape}|{plural}" for shape, plural in PLURALS.items())])
    count = rf"(?P<value>{'|'.join(NUMBERS)}) (?P<about>{counted})"
    ground = rf"(?P<value>{'|'.join(BACKGROUNDS)})"
    words = rf"(?P<value>{'|'.join(['left of', 'above', 'inside', 'touching', *OPPOSITES])})"
    shapes: dict[Kind, str] = {
        "object": rf"(?:there is |the picture shows )?{thing}",
        "count": rf"(?:there (?:is|are) |the picture has )?{count}",
        "background": rf"the background is {ground}|all is on a {ground.replace('value', 'v2')} background"
        rf"|a {ground.replace('value', 'v3')} background",
        "relation": rf"the (?P<about>{name}) is {words} the (?P<other>{name})",
    }
    return tuple((kind, re.compile(pattern, re.IGNORECASE | re.ASCII)) for kind, pattern in shapes.items())


@lru_cache(maxsize=65536)
def _parse_sentence(sentence: str) -> tuple[Claim, ...]:
    for kind, pattern in _compile_grammar():
        if match := pattern.fullmatch(sentence.removesuffix(".")):
            return _read_match(kind, match)
    return ()


def read_written_relation(sentence: str) -> tuple[str, str, str] | None:
    """The two things of a relation and the word between them as they are written, not in canonical form.

    >>> read_written_relation("The blue star is right of the red ring.")
    ('blue star', 'right of', 'red ring')
    """
    pattern = dict(_compile_grammar())["relation"]
    match = pattern.fullmatch(sentence.strip().removesuffix("."))
    return (match["about"].lower(), match["value"].lower(), match["other"].lower()) if match else None


@lru_cache(maxsize=65536)
def find_fragments(sentence: str) -> frozenset[Claim]:
    """The claims of every substring that would parse alone, within words too, so that no text around one hides it."""
    matches = ((kind, pattern.match(sentence, i)) for kind, pattern in _compile_grammar() for i in range(len(sentence)))
    return frozenset(claim for kind, match in matches if match for claim in _read_match(kind, match))


def _read_match(kind: Kind, match: re.Match[str]) -> tuple[Claim, ...]:
    parts = {name: value.lower() for name, value in match.groupdict().items() if value}
    match kind:
        case "count":
            about = SINGULARS.get(parts["about"], parts["about"])
            return (Claim("count", about, str(NUMBERS.index(parts["value"]))),)
        case "background":
            return (Claim("background", "", next(iter(parts.values()))),)
        case "relation":
            return (make_relation(parts["about"], parts["value"], parts["other"]),)
    details: tuple[Kind, ...] = ("size", "texture")
    about = parts["about"]
    return Claim("object", about, ""), *(Claim(d, about, parts[d]) for d in details if d in parts)
