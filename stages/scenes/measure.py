"""Accuracy of scene captions, with stated things matched one to one with the things in the picture.

Every object sentence states a thing. A maximum matching pairs stated things with things of the picture; a stated thing
that is left over, for instance because it is named a second time, is false in all its parts. A count is false when it
is wrong or when the caption lists more things than it counts. A repeated relation, count or background is one claim.
A sentence outside the grammar is one false claim each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.sources.scenes import Scene, Thing
from stages.scenes.claims import KINDS, Claim, Kind, Parts, is_exceeded, is_true, list_facts, parse_caption


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Numbers of claims of one kind."""

    num_stated: int = 0
    num_true: int = 0  # of those stated
    num_found: int = 0  # facts of the picture that are stated
    num_facts: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            num_stated=self.num_stated + other.num_stated,
            num_true=self.num_true + other.num_true,
            num_found=self.num_found + other.num_found,
            num_facts=self.num_facts + other.num_facts,
        )

    @property
    def num_false(self) -> int:
        return self.num_stated - self.num_true

    @property
    def precision(self) -> float:
        return self.num_true / self.num_stated if self.num_stated else 0.0

    @property
    def recall(self) -> float:
        return self.num_found / self.num_facts if self.num_facts else 0.0

    @property
    def f1(self) -> float:
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A caption measured against the truth."""

    kinds: Mapping[Kind, Tally]
    num_stray: int  # sentences outside the grammar
    names_twice: bool  # a thing is stated more often than the picture has it
    repeats_sentence: bool  # a sentence occurs twice, word by word

    @property
    def total(self) -> Tally:
        return sum(self.kinds.values(), Tally(num_stated=self.num_stray))

    @property
    def is_wholly_right(self) -> bool:
        """True when something is stated and nothing is false."""
        return self.total.num_stated > 0 and self.total.num_false == 0


def measure_caption(text: str, scene: Scene) -> Measure:
    """Compares the claims of a caption with a scene's truth.

    >>> from pipeline.sources.scenes import draw_scene
    >>> measure_caption("A red circle. A red circle.", draw_scene(0, 7)).names_twice
    True
    """
    sentences = parse_caption(text).sentences
    mentions = [sentence.claims for sentence in sentences if sentence.claims and sentence.claims[0].kind == "object"]
    others = {c for s in sentences for c in s.claims if c.kind not in ("object", "size", "texture")}
    truth = list_facts(scene)
    matched = list(match_things(mentions, scene))
    true = [*matched, *(claim for claim in others if is_true(claim, scene) and not is_exceeded(claim, mentions))]
    stated = Counter(claim.kind for claims in (*mentions, others) for claim in claims)
    num_true, num_facts = Counter(claim.kind for claim in true), Counter(claim.kind for claim in truth)
    found = Counter(claim.kind for claim in set(true).intersection(truth))
    in_picture = Counter(thing.name for thing in scene.things)
    names = Counter(mention[0].about for mention in mentions)
    texts = [sentence.text.lower() for sentence in sentences]
    return Measure(
        kinds={
            kind: Tally(
                num_stated=stated[kind], num_true=num_true[kind], num_found=found[kind], num_facts=num_facts[kind]
            )
            for kind in KINDS
        },
        num_stray=sum(not sentence.claims for sentence in sentences),
        names_twice=any(num > max(1, in_picture[name]) for name, num in names.items()),
        repeats_sentence=len(set(texts)) < len(texts),
    )


def match_things(mentions: Sequence[Parts], scene: Scene) -> Iterable[Claim]:
    """The true parts of stated things under the matching that makes most of them true."""
    best: dict[frozenset[int], Parts] = {frozenset(range(len(scene.things))): ()}  # unmatched things -> true parts
    for mention in mentions:
        for free, true in list(best.items()):
            for number in free:
                longer = (*true, *list_true_parts(mention, scene.things[number]))
                if len(longer) > max(len(true), len(best.get(free - {number}, ()))):
                    best[free - {number}] = longer
    return max(best.values(), key=len)


def list_true_parts(mention: Parts, thing: Thing) -> Parts:
    """The parts of a stated thing that are true of a thing of the picture; none when it has another name."""
    if mention[0].about != thing.name:
        return ()
    values = {"object": "", "size": thing.size, "texture": thing.texture}
    return tuple(claim for claim in mention if claim.value == values[claim.kind])
