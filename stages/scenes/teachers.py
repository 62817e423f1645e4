"""Simulated teachers: five captioners that see a scene's truth, each with its own blind spots.

They replace strong vision-language models and are an engine (`kind = "stages.scenes.teachers"`), which finds the truth
through a request's `source_key` and nothing else. Asked how things are placed (`PLACES`), they answer by relations.
Other voices make labels and what is to be labelled: `speaker` makes one statement, true or false by one swap; `placer`
says how things are related and nothing else; `stranger` makes one statement that cannot be decided in the words of this
world; `repeater` captions a scene and says something again; `labeller` answers a judge's question about the last line
of its prompt; `realigner` captions a scene with those names of the alt text in its prompt that fit, `reader` with those
words quoted in its prompt that its sign has. Two voices see no truth, but the captions that are quoted in their prompt:
`merger` says what most of them say, `translator` says the only one in German.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Literal

from pipeline.engines import Reply, Request, finish_attempt
from pipeline.sections import key
from pipeline.sources._scene_words import draw_sign_text
from pipeline.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    centre_in_tenths,
    draw_scene,
    find_relation,
    find_scene,
    is_related,
)
from stages.scenes.claims import (
    KINDS,
    NUMBERS,
    THINGS,
    Claim,
    is_true,
    list_facts,
    list_thing_facts,
    make_relation,
    parse_caption,
    read_written_relation,
    write_caption,
    write_sentence,
)
from stages.scenes.german import translate


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher's faults, each as the share of occasions on which it happens."""

    slips: float = 0.03  # a word is replaced by a random one of its kind
    small_overlooked: float = 0.0
    rim_overlooked: float = 0.0  # things whose centre is in the outer quarter of the picture
    colours: Mapping[str, str] = field(default_factory=dict)  # true -> seen as
    shapes: Mapping[str, str] = field(default_factory=dict)
    textures: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    relations: Mapping[str, str] = field(default_factory=dict)
    backgrounds: Mapping[str, str] = field(default_factory=dict)
    confused: float = 0.0  # of the confusions above
    crowds_undercounted: float = 0.0  # a count above three is one too low
    omitted: Mapping[str, float] = field(default_factory=dict)  # kind of claim -> share left out


TEACHERS: Mapping[str, Teacher] = {
    "hasty": Teacher(
        small_overlooked=0.4,
        crowds_undercounted=0.4,
        omitted={"texture": 0.5, "relation": 0.5, "size": 0.2, "background": 0.2},
    ),
    "warm": Teacher(
        colours={"orange": "red", "purple": "blue", "yellow": "orange"}, backgrounds={"teal": "grey"}, confused=0.7
    ),
    "boxy": Teacher(
        shapes={"diamond": "square", "ring": "circle", "heart": "triangle"}, sizes={"small": "large"}, confused=0.6
    ),
    "plain": Teacher(
        textures={"striped": "solid", "dotted": "solid"},
        relations={"touching": "left of", "inside": "touching"},
        confused=0.7,
        omitted={"background": 0.4},
    ),
    "central": Teacher(
        rim_overlooked=0.5,
        relations={"left of": "right of", "above": "below"},
        confused=0.35,
        crowds_undercounted=0.7,
        omitted={"size": 0.3},
    ),
}
SHARED = {  # the same teachers when most share a blind spot: they see no patterns
    name: replace(teacher, textures={"striped": "solid", "dotted": "solid"}, confused=max(teacher.confused, 0.85))
    if name != "hasty"
    else teacher
    for name, teacher in TEACHERS.items()
}
STRANGE_THINGS = ("dog", "pentagon", "house", "tree", "letter", "spiral", "person", "boat", "lamp", "word")
STRANGE_PLACES = ("near", "behind", "on top of", "beside", "bigger than", "far from")
STRANGE_LOOKS = ("shiny", "beautiful", "crooked", "transparent", "calm", "old", "blurred")
CANNOT_SAY = "cannot say"  # where the schema of a judge's answer has it
QUOTED = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)  # a text in a prompt, between its fences
NAMED = re.compile(r"\bAn? (\w+ \w+) called (\w+)\.")  # in an alt text: the thing, its name
BEFORE = re.compile(r"Said before:\n(`{3,})\n(.*?)\n\1", re.DOTALL)  # in the prompt of rubrics/scenes_open.toml
PLACES = "Say how each two things are placed."  # the question that teachers answer by relations instead of a caption
RELATIONS = ("left of", "right of", "above", "below", "touching", "inside", "around")
PLACER = Teacher()
PLACED = 4  # pairs that it states at most


@dataclass(frozen=True, kw_only=True)
class Config:
    teacher: Literal[
        "hasty",
        "warm",
        "boxy",
        "plain",
        "central",
        "consensus",
        "speaker",
        "placer",
        "stranger",
        "repeater",
        "labeller",
        "merger",
        "translator",
        "realigner",
        "reader",
    ] = key(
        "hasty",
        "which voice answers: a teacher's name, consensus, speaker, placer, stranger, repeater, labeller, merger,"
        " translator, realigner or reader",
    )
    shared: bool = key(False, "the teachers of whom most share a blind spot: they see patterns as plain colour")
    revision: Literal[1, 2] = key(
        1,
        "of the labeller: 2 explains a relation in the order in which its sentence names the things, refuses what was"
        " said before, and cannot say whether a sentence outside the words of this world holds",
        stamp_default=False,
    )


def caption_scene(teacher: str, scene: Scene, seed: int, *, shared: bool = False) -> str:
    """A teacher's caption of a scene, deterministic in (teacher, scene, seed).

    Args:
        shared: the teacher is one of `SHARED`.

    >>> from pipeline.sources.scenes import draw_scene
    >>> caption_scene("hasty", draw_scene(0, 0), 0) == caption_scene("hasty", draw_scene(0, 0), 0)
    True
    """
    rng = Random(f"teacher/{teacher}/{scene.seed}/{scene.index}/{seed}")
    return write_caption(draw_claims((SHARED if shared else TEACHERS)[teacher], scene, rng), rng)


def answer_places(teacher: str, scene: Scene, seed: int, *, shared: bool = False) -> str:
    """What a teacher answers when asked how things are placed: all relations of those it sees, deterministic as above.

    Of a thing alone, the thing.
    """
    rng = Random(f"places/{teacher}/{scene.seed}/{scene.index}/{seed}")
    voice = (SHARED if shared else TEACHERS)[teacher]
    seen = _see_scene(voice, scene, rng)
    pairs = [(a, b) for a, b in combinations(seen.left_to_right, 2) if a.name != b.name]
    claims = [make_relation(a.name, word, b.name) for a, b in pairs for word in RELATIONS if is_related(a, word, b)]
    stated = [_state_claim(voice, claim, rng) for claim in claims]
    return write_caption(list(dict.fromkeys(stated)) or list_thing_facts(seen.things[0])[:1], rng)


def merge_captions(captions: Iterable[str]) -> str:
    """One caption of the claims that most of the captions make."""
    captions = list(captions)
    votes = Counter(claim for text in captions for claim in parse_caption(text).claims)
    agreed = [claim for claim, count in votes.items() if count > len(captions) // 2]
    names = {claim.about for claim in agreed if claim.kind == "object"}
    claims = [claim for claim in agreed if claim.kind not in ("size", "texture") or claim.about in names]
    return write_caption(sorted(claims, key=lambda claim: (KINDS.index(claim.kind), claim)), Random(0))


def draw_claims(teacher: Teacher, scene: Scene, rng: Random) -> list[Claim]:
    """The claims of one caption, in order: facts of the scene as the teacher sees it, without those it omits."""
    facts = list_facts(_see_scene(teacher, scene, rng))
    claims = [claim for claim in facts if rng.random() >= teacher.omitted.get(claim.kind, 0.0)]
    return [_state_claim(teacher, claim, rng) for claim in claims]


def _see_scene(teacher: Teacher, scene: Scene, rng: Random) -> Scene:
    things = [thing for thing in scene.things if not _overlooks(teacher, thing, scene, rng)] or scene.things[:1]
    return replace(
        scene,
        background=_see_word(teacher, scene.background, teacher.backgrounds, BACKGROUNDS, rng),
        things=tuple(_see_thing(teacher, thing, rng) for thing in things),
    )


def _overlooks(teacher: Teacher, thing: Thing, scene: Scene, rng: Random) -> bool:
    if thing.size == "small" and rng.random() < teacher.small_overlooked:
        return True
    across, down = thing.x / scene.width, thing.y / scene.height
    on_rim = min(across, 1 - across, down, 1 - down) < 0.25
    return on_rim and rng.random() < teacher.rim_overlooked


def _see_thing(teacher: Teacher, thing: Thing, rng: Random) -> Thing:
    return replace(
        thing,
        colour=_see_word(teacher, thing.colour, teacher.colours, COLOURS, rng),
        shape=_see_word(teacher, thing.shape, teacher.shapes, SHAPES, rng),
        size=_see_word(teacher, thing.size, teacher.sizes, SIZES, rng),
        texture=_see_word(teacher, thing.texture, teacher.textures, TEXTURES, rng),
    )


def _see_word(teacher: Teacher, word: str, seen_as: Mapping[str, str], words: Iterable[str], rng: Random) -> str:
    if rng.random() < teacher.slips:
        return rng.choice(list(words))
    return seen_as[word] if word in seen_as and rng.random() < teacher.confused else word


def _state_claim(teacher: Teacher, claim: Claim, rng: Random) -> Claim:
    if claim.kind == "count" and int(claim.value) > 3 and rng.random() < teacher.crowds_undercounted:
        return claim._replace(value=str(int(claim.value) - 1))
    if claim.kind == "relation":
        word = _see_word(teacher, claim.value, teacher.relations, ("left of", "above"), rng)
        return make_relation(claim.about, word, claim.other)
    return claim


def draw_statement(scene: Scene, rng: Random, *, text: str | None = None) -> str:
    """One sentence about a scene, true or, half of the time, false because one word is swapped for another of its kind.

    Args:
        text: a caption to take the sentence from; without a sentence in it that parses, a new one is drawn.
    """
    groups = [sentence.claims for sentence in parse_caption(text or "").sentences if sentence.claims]
    group = rng.choice(groups) if groups else _draw_true_group(scene, rng)
    if rng.random() < 0.5 and are_true(group, scene):
        group = swap_word(group, scene, rng)
    return write_sentence(group, rng)


def are_true(group: Sequence[Claim], scene: Scene) -> bool:
    return all(is_true(claim, scene) for claim in group)


def _draw_true_group(scene: Scene, rng: Random) -> tuple[Claim, ...]:
    """The claims of a true sentence; every kind is frequent enough to be learnt."""
    things, chance = scene.things, rng.random()
    if chance < 0.1:
        return (Claim("background", "", scene.background),)
    if chance < 0.27:
        about = rng.choice((THINGS, THINGS, THINGS, rng.choice(things).shape))
        number = sum(about in (THINGS, thing.shape) for thing in things)
        return (Claim("count", about, str(number)),)
    if chance < 0.6 and len(things) > 1:
        a, b = rng.sample(things, 2)
        words = [word for word in ("left of", "right of", "above", "below") if is_related(a, word, b)]
        main = find_relation(a, b)
        return (make_relation(a.name, main if rng.random() < 0.6 or not words else rng.choice(words), b.name),)
    thing, *details = list_thing_facts(rng.choice(things))
    return thing, *(detail for detail in details if rng.random() < 0.8)


def swap_word(group: Sequence[Claim], scene: Scene, rng: Random) -> tuple[Claim, ...]:
    """The group with one word changed, so that it is false of the scene.

    Raises:
        ValueError: no swap makes it false.
    """
    candidates = [other for other in list_swaps(group) if not are_true(other, scene)]
    if not candidates:
        raise ValueError(f"no swap makes {group} false")
    word = rng.choice(sorted({_find_swapped_word(group, other) for other in candidates}))
    return rng.choice([other for other in candidates if _find_swapped_word(group, other) == word])


def list_swaps(group: Sequence[Claim]) -> list[tuple[Claim, ...]]:
    """All groups that differ in one word of the vocabulary."""
    first, *details = group
    if first.kind == "background":
        return [(first._replace(value=word),) for word in BACKGROUNDS if word != first.value]
    if first.kind == "count":
        return [(first._replace(value=str(n)),) for n in range(1, 8) if str(n) != first.value]
    if first.kind == "relation":
        others = [make_relation(first.about, word, first.other) for word in RELATIONS]
        others += [make_relation(name, first.value, first.other) for name in _list_other_names(first.about)]
        others += [make_relation(first.about, first.value, name) for name in _list_other_names(first.other)]
        return [(claim,) for claim in dict.fromkeys(others) if claim != first and claim.about != claim.other]
    choices = {"size": SIZES, "texture": TEXTURES}
    changed = [
        (first, *(detail._replace(value=word) if d is detail else d for d in details))
        for detail in details
        for word in choices[detail.kind]
        if word != detail.value
    ]
    return changed + [tuple(c._replace(about=name) for c in group) for name in _list_other_names(first.about)]


def _list_other_names(name: str) -> list[str]:
    colour, shape = name.split()
    return [f"{c} {shape}" for c in COLOURS if c != colour] + [f"{colour} {s}" for s in SHAPES if s != shape]


def _find_swapped_word(group: Sequence[Claim], other: Sequence[Claim]) -> str:
    """The kind of the word that differs: size, texture, colour, shape, relation, count or background."""
    for before, after in zip(group, other, strict=True):
        if before.kind in ("size", "texture", "count", "background") and before.value != after.value:
            return before.kind
    first, changed = group[0], other[0]
    if first.kind == "relation" and {first.about, first.other} == {changed.about, changed.other}:
        return "relation"
    before_words = {*first.about.split(), *first.other.split()}
    after_words = {*changed.about.split(), *changed.other.split()}
    return "colour" if (before_words ^ after_words) & set(COLOURS) else "shape"


def answer_statement(sentence: str, scene: Scene, *, revision: int = 1) -> tuple[str, bool]:
    """A short reason, from what the scene shows of a sentence's subject, and whether the sentence is true.

    Args:
        revision: 1 explains a relation in canonical form, so that the reason of "right of" ends with "left of"; 2
            explains the two things in the order of the sentence, so that the reason has the word that decides.

    >>> from pipeline.sources.scenes import draw_scene
    >>> answer_statement("The background is pink.", draw_scene(0, 0))
    ('brown background', False)
    """
    parsed = parse_caption(sentence).sentences
    if len(parsed) != 1 or not parsed[0].claims:
        return "no statement about the picture", False
    group = parsed[0].claims
    true = are_true(group, scene)
    if revision > 1 and (written := read_written_relation(sentence)):
        about, _, other = written
        return _explain_relation(about, other, scene), true
    return _explain_group(group, scene), true


def label_statement(sentence: str, scene: Scene, *, before: str = "") -> tuple[str, bool | None]:
    """As `answer_statement`, second revision; a thing that was named before is not there again.

    Args:
        before: the sentences of the caption that precede it.

    Returns:
        The reason, and the verdict; None: it cannot be decided in the words of this world.
    """
    parsed = parse_caption(sentence).sentences
    if len(parsed) != 1 or not parsed[0].claims:
        return "no statement about the picture", None
    first = parsed[0].claims[0]
    if first in parse_caption(before).claims:
        return f"{first.about or first.value} was named before", False
    return answer_statement(sentence, scene, revision=2)


def draw_strange_statement(rng: Random) -> str:
    """A sentence that no claim of this world decides."""
    colour, shape, other = rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), rng.choice(list(SHAPES))
    thing, place = rng.choice(STRANGE_THINGS), rng.choice(STRANGE_PLACES)
    return rng.choice(
        (
            f"There is a {thing}.",
            f"A {colour} {thing}.",
            f"A {thing} is {place} the {colour} {shape}.",
            f"The {shape} is {place} the {other}.",
            f"A {rng.choice(STRANGE_LOOKS)} {colour} {shape}.",
            f"The picture looks {rng.choice(STRANGE_LOOKS)}.",
            f"The {colour} {shape} casts a shadow.",
            f"Nobody knows where the {shape} comes from.",
        )
    )


def place_things(scene: Scene, rng: Random) -> str:
    """How up to four pairs of things are related, in random order; of a thing alone, the thing."""
    seen = _see_scene(PLACER, scene, rng)
    pairs = [(a, b) for a, b in combinations(seen.things, 2) if a.name != b.name]
    claims = [make_relation(a.name, find_relation(a, b), b.name) for a, b in pairs]
    chosen = rng.sample(claims, min(PLACED, len(claims)))
    return write_caption(chosen or list_thing_facts(seen.things[0])[:1], rng)


def repeat_statement(text: str, rng: Random) -> str:
    """A caption with one of its sentences again, word by word or in other words."""
    sentences = [sentence for sentence in parse_caption(text).sentences if sentence.claims]
    chosen = rng.choice(sentences)
    again = chosen.text if rng.random() < 0.5 else write_sentence(chosen.claims[: rng.randint(1, 3)], rng)
    return f"{text} {again}"


def keep_right_names(caption: str, alt_text: str, scene: Scene) -> str:
    """The caption, and after it the alt text's names for things that are in the scene."""
    things = {thing.name for thing in scene.things}
    return " ".join([caption, *(say_name(*found) for found in NAMED.findall(alt_text) if found[0] in things)])


def say_name(thing: str, name: str) -> str:
    """
    >>> say_name("red ring", "Kalu")
    'The red ring is called Kalu.'
    """
    return f"The {thing} is called {name}."


def add_sign(caption: str, quoted: Iterable[str], scene: Scene) -> str:
    """The caption, and after it what the scene's sign says if that is quoted: a finder also reads shapes as letters."""
    text = draw_sign_text(scene.seed, scene.index)
    return f"{caption} {say_sign(text)}" if text in quoted else caption


def say_sign(text: str) -> str:
    """
    >>> say_sign("Open")
    'The sign says "Open".'
    """
    return f'The sign says "{text}".'


def find_quoted(prompt: str) -> list[str]:
    """The texts that a prompt quotes between fences.

    Raises:
        ValueError: it quotes none.
    """
    texts = [text for _, text in QUOTED.findall(prompt)]
    if not texts:
        raise ValueError("the prompt quotes no caption")
    return texts


def _explain_group(group: Sequence[Claim], scene: Scene) -> str:
    first = group[0]
    if first.kind == "background":
        return f"{scene.background} background"
    if first.kind == "count":
        named = [t.name for t in scene.left_to_right if first.about in (THINGS, t.shape)]
        return f"{', '.join(named)}: {NUMBERS[len(named)]}" if named else NUMBERS[0]
    if first.kind == "relation":
        return _explain_relation(first.about, first.other, scene)
    return _describe_closest(group, scene)


def _explain_relation(about: str, other: str, scene: Scene) -> str:
    """All things with their positions, then the two in question with all their true relations, or the missing one.

    Listing everything first keeps the answer from being led by the question; repeating the two positions beside each
    other lets a model compare them.
    """
    things = {thing.name: thing for thing in scene.things}
    placed = {name: "{} {} {}".format(name, *centre_in_tenths(thing, scene)) for name, thing in things.items()}
    listed = ", ".join(placed[thing.name] for thing in scene.left_to_right)
    for name in (about, other):
        if name not in things:
            return f"{listed}: no {name}"
    a, b = things[about], things[other]
    relations = ", ".join(word for word in RELATIONS if is_related(a, word, b)) or "level"
    return f"{listed}: {placed[a.name]}, {placed[b.name]}: {relations}"


def _describe_closest(group: Sequence[Claim], scene: Scene) -> str:
    """The thing in the scene that most resembles the one described."""
    colour, shape = group[0].about.split()
    details = {claim.value for claim in group[1:]}

    def likeness(thing: Thing) -> tuple[int, int]:
        return 2 * (thing.shape == shape) + 2 * (thing.colour == colour), len(details & {thing.size, thing.texture})

    thing = max(scene.left_to_right, key=likeness)
    return f"{thing.size} {thing.texture} {thing.name}"


def sample_texts(num_scenes: int) -> Iterator[str]:
    """Captions, statements and verdicts of some scenes: the vocabulary of this world."""
    rng = Random(0)
    for index in range(num_scenes):
        truth = draw_scene(0, index)
        yield write_caption(list_facts(truth), rng)
        yield caption_scene("hasty", truth, 0)
        sentence = draw_statement(truth, rng)
        yield f"{sentence}\n{format_verdict(*answer_statement(sentence, truth))}"


def format_verdict(reason: str, true: bool | None) -> str:
    return json.dumps({"reason": reason, "verdict": CANNOT_SAY if true is None else "yes" if true else "no"})


def open(config: Config) -> TeacherEngine:
    return TeacherEngine(config)


class TeacherEngine:
    """Answers requests about scenes from their truth, lazily and one at a time."""

    def __init__(self, config: Config) -> None:
        self._voice, self._shared, self._revision = config.teacher, config.shared, config.revision
        self.revision = str(config.revision)
        self.model = f"teacher-{config.teacher}" + ("-shared" if config.shared else "")

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            attempt, is_final = 0, False
            while not is_final:
                attempt += 1
                reply, is_final = finish_attempt(request, self._answer(request, request.seed + attempt - 1), attempt)
            yield reply

    def waiting(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def _answer(self, request: Request, seed: int) -> Reply:
        try:
            text = self._write_text(request, find_scene(request.source_key), seed)
        except ValueError as error:
            return Reply(error=str(error))
        return Reply(text=text, finish_reason="stop", num_output_tokens=len(text.split()))

    def _write_text(self, request: Request, truth: Scene, seed: int) -> str:
        if self._voice == "labeller":
            return self._label(request, truth)
        if self._voice == "merger":
            return merge_captions(find_quoted(request.prompt))
        if self._voice == "translator":
            return translate(find_quoted(request.prompt)[0])
        if self._voice == "realigner":
            return keep_right_names(caption_scene("hasty", truth, seed), find_quoted(request.prompt)[0], truth)
        if self._voice == "reader":
            quoted = [text for _, text in QUOTED.findall(request.prompt)]
            return add_sign(caption_scene("hasty", truth, seed), quoted, truth)
        if self._voice == "stranger":
            return draw_strange_statement(Random(f"stranger/{truth.seed}/{truth.index}/{seed}"))
        if self._voice == "placer":
            return place_things(truth, Random(f"placer/{truth.seed}/{truth.index}/{seed}"))
        if self._voice == "repeater":
            rng = Random(f"repeater/{truth.seed}/{truth.index}/{seed}")
            return repeat_statement(caption_scene(rng.choice(list(TEACHERS)), truth, seed), rng)
        if self._voice == "speaker":
            rng = Random(f"speaker/{truth.seed}/{truth.index}/{seed}")
            text = caption_scene(rng.choice(list(TEACHERS)), truth, seed) if rng.random() < 0.5 else None
            return draw_statement(truth, rng, text=text)
        if self._voice == "consensus":
            return merge_captions(caption_scene(name, truth, seed, shared=self._shared) for name in TEACHERS)
        answer = answer_places if request.prompt.strip() == PLACES else caption_scene
        return answer(self._voice, truth, seed, shared=self._shared)

    def _label(self, request: Request, truth: Scene) -> str:
        sentence = request.prompt.strip().splitlines()[-1]
        if self._revision == 1:
            return format_verdict(*answer_statement(sentence, truth))
        before = BEFORE.search(request.prompt)
        reason, true = label_statement(sentence, truth, before=before[2] if before else "")
        return format_verdict(reason, true if CANNOT_SAY in (request.schema or "") else bool(true))
