"""The health of judges: bad ones are called bad for the right reason, good ones are not.

Judges are functions of true and spoiled captions of the scenes world, or of measured rates; no model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest

from pipeline.sources.scenes import Scene, draw_scene
from pipeline.storage.sentences import split_sentences
from pipeline.storage.words import count_words
from stages.audit.health import Cause, Health, RatedCopy, examine_judge
from stages.audit.spoilers import spoil_text
from stages.rubrics import UNASKED
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import caption_scene

NUM_CAPTIONS = 40  # of which copies are judged: 2 % of 2,000
POOL = 240
NUM_SEEDS = 100


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that a judge sees, with the truth of its sentences."""

    kind: str = ""  # of error; "": the original
    candidate: int
    num_words: int
    truth: tuple[bool, ...]  # by sentence
    before: tuple[bool, ...]  # of the original
    changed: tuple[int, ...] = ()  # the places of sentences that the original does not have there

    @property
    def is_right(self) -> bool:
        return all(self.truth)


Answer = Sequence[float | None]  # one value for a caption, or one for each sentence
Judge = Callable[[Text, Random], Answer]


@pytest.fixture(scope="module")
def pool() -> list[list[Text]]:
    """Captions by a teacher that errs, each followed by its spoiled copies."""
    groups, other = [], None
    for index in range(POOL):
        scene = draw_scene(5, index)
        words = caption_scene("hasty", scene, index)
        sentences = split_sentences(words)
        before = find_truth(words, scene)
        original = Text(candidate=index % 4, num_words=count_words(words), truth=before, before=before)
        copies = [
            replace(
                original,
                kind=one.kind,
                num_words=count_words(one.text),
                truth=find_truth(one.text, scene),
                changed=tuple(n for n, new in enumerate(split_sentences(one.text)) if [new] != sentences[n : n + 1]),
            )
            for one in spoil_text(words, seed=f"test/{index}", other=other)
        ]
        groups.append([original, *copies])
        other = words
    return groups


def find_truth(text: str, scene: Scene) -> tuple[bool, ...]:
    return tuple(measure_caption(one, scene).is_wholly_right for one in split_sentences(text))


def rate(pool: Sequence[Sequence[Text]], judge: Judge, seed: int) -> list[RatedCopy]:
    rng = Random(seed)
    found = []
    for number in rng.sample(range(len(pool)), NUM_CAPTIONS):
        original, *copies = pool[number]
        first = judge(original, rng)
        for text in copies:
            answer = judge(text, rng)
            is_swap = len(first) == len(text.truth) > 1
            changed = [value for place in text.changed if is_swap and (value := first[place]) is not None]
            found.append(
                RatedCopy(
                    kind=text.kind,
                    caption=str(number),
                    candidate=text.candidate,
                    original=mean(first),
                    copy=mean(answer),
                    accepted=min(changed, default=None),
                    num_words=(original.num_words, text.num_words),
                    sentences=tuple(answer) if len(answer) > 1 else (),
                )
            )
    return found


def mean(answer: Answer) -> float | None:
    known = [value for value in answer if value is not None]
    return sum(known) / len(known) if 2 * len(known) > len(answer) else None


def examine(pool: Sequence[Sequence[Text]], judge: Judge, seed: int) -> Health:
    return examine_judge(rate(pool, judge, seed), unasked=UNASKED)


def is_true(text: Text, _: Random) -> Answer:
    return [text.is_right]


def by_sentence(text: Text, _: Random) -> Answer:
    return [float(one) for one in text.truth]


def blind_to(*kinds: str, judge: Judge = by_sentence) -> Judge:
    return lambda text, rng: judge(replace(text, truth=text.before) if text.kind in kinds else text, rng)


def noisy(judge: Judge, *, share: float) -> Judge:
    """Answers of which a share is drawn at random."""
    return lambda text, rng: [one if rng.random() >= share else rng.random() < 0.5 for one in judge(text, rng)]


BAD: Mapping[str, tuple[Judge, Cause, str]] = {  # name -> judge, the reason and the kind of the first finding
    "always yes": (lambda *_: [1.0], "always yes", ""),
    "nearly always yes": (lambda _, rng: [rng.random() < 0.97], "always yes", ""),
    "always yes to sentences": (lambda text, _: [1.0] * len(text.truth), "always yes", ""),
    "always no": (lambda *_: [0.0], "always no", ""),
    "the same value": (lambda *_: [0.7], "constant", ""),
    "random": (lambda _, rng: [rng.random() < 0.5], "random", ""),
    "random, mostly yes": (lambda _, rng: [rng.random() < 0.7], "random", ""),
    "random by sentence": (lambda text, rng: [rng.random() < 0.5 for _ in text.truth], "random", ""),
    "random values": (lambda _, rng: [rng.random()], "random", ""),
    "inverted": (lambda text, _: [not text.is_right], "inverted", ""),
    "inverted by sentence": (lambda text, _: [not one for one in text.truth], "inverted", ""),
    "sees no image": (lambda text, _: [float(one) for one in text.before], "unseeing", ""),
    "blind to numbers": (blind_to("number"), "blind", "number"),
    "blind to numbers, by caption": (blind_to("number", judge=is_true), "blind", "number"),
    "blind to colours": (blind_to("colour"), "blind", "colour"),
    "blind to colours, unsteady": (noisy(blind_to("colour"), share=0.1), "blind", "colour"),
    "blind to inventions": (
        lambda t, _: [all(t.truth[: len(t.before)])] if t.kind == "invented" else [t.is_right],
        "blind",
        "invented",
    ),
    "accepts short captions": (lambda text, _: [text.num_words < 22], "length", ""),
    "accepts long captions": (lambda text, _: [text.num_words >= 22], "length", ""),
    "values shortness": (lambda text, _: [10 / (10 + text.num_words)], "length", ""),
    "accepts the first candidate": (lambda text, _: [text.candidate == 0], "candidate", ""),
    "values candidates by place": (lambda text, _: [1 - text.candidate / 3], "candidate", ""),
    "accepts the first sentence": (lambda text, _: [float(i == 0) for i in range(len(text.truth))], "sentence", ""),
    "reads the first sentence": (lambda text, _: [text.truth[0]], "beginning", ""),
    "reads the last sentence": (lambda text, _: [text.truth[-1]], "end", ""),
    "fails a third of its calls": (
        lambda text, rng: [None if rng.random() < 1 / 3 else one for one in by_sentence(text, rng)],
        "failures",
        "",
    ),
    "fails a third of its captions": (
        lambda text, rng: [None if rng.random() < 1 / 3 else text.is_right],
        "failures",
        "",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_judge_is_called_bad_for_the_right_reason(pool: list[list[Text]], name: str) -> None:
    judge, cause, kind = BAD[name]
    for seed in range(10):
        health = examine(pool, judge, seed)
        assert health.findings and (health.findings[0].cause, health.findings[0].kind) == (cause, kind), seed


@pytest.mark.slow
@pytest.mark.parametrize("judge", [is_true, by_sentence, noisy(by_sentence, share=0.1)])
def test_a_judge_that_knows_the_truth_is_not_called_bad(pool: list[list[Text]], judge: Judge) -> None:
    found = [examine(pool, judge, seed) for seed in range(NUM_SEEDS)]
    assert not [health.findings for health in found if health.is_bad]


# Of the judge of `recap demo`, with share = 0.25: kind -> number of copies by sign and by what was accepted before.
# Copies of the first 43 captions that were judged.
SHIPPED: Mapping[str, Mapping[tuple[int, bool], int]] = {
    "attribute": {(1, True): 33, (0, True): 2, (0, False): 1},
    "colour": {(0, False): 3, (1, True): 40},
    "dropped": {(1, False): 10, (0, True): 30, (-1, False): 3},
    "foreign_first": {(1, True): 30, (1, False): 13},
    "foreign_last": {(1, True): 30, (1, False): 13},
    "foreign_middle": {(1, False): 12, (1, True): 29, (0, True): 1},
    "invented": {(1, False): 12, (1, True): 30},
    "number": {(0, False): 6, (1, True): 21, (0, True): 5, (-1, False): 3},
    "object": {(0, True): 4, (1, True): 37, (0, False): 1},
    "other_caption": {(1, False): 10, (1, True): 32},
    "repeated": {(0, True): 29, (1, False): 1, (-1, False): 11},
    "side": {(-1, False): 1, (0, False): 1},
}
SWAPS = ("attribute", "colour", "number", "object", "side")  # whose changed sentence the judge has judged by itself


def draw_shipped(seed: int) -> list[RatedCopy]:
    """Copies by the measured rates; a caption that is not wholly accepted has 0.8."""
    rng, copies = Random(seed), []
    for kind, counts in SHIPPED.items():
        num = NUM_CAPTIONS * sum(counts.values()) // 43
        for caption, (sign, accepted) in enumerate(rng.choices(list(counts), list(counts.values()), k=num)):
            original = 1.0 if accepted and kind not in SWAPS else 0.8
            copies.append(
                RatedCopy(
                    kind=kind,
                    caption=str(caption),
                    original=original,
                    copy=original - 0.2 * sign,
                    accepted=float(accepted) if kind in SWAPS else None,
                )
            )
    return copies


@pytest.mark.slow
def test_the_shipped_judge_is_not_called_bad_and_its_rubric_is_named_for_what_it_does_not_ask() -> None:
    found = [examine_judge(draw_shipped(seed), unasked=UNASKED) for seed in range(NUM_SEEDS)]
    assert not [health.findings for health in found if health.is_bad]
    notes = {finding.text for health in found for finding in health.findings}
    assert all("its rubric does not ask about " in note for note in notes) and notes
    alarmed = [examine_judge(draw_shipped(seed), unasked=()).is_bad for seed in range(NUM_SEEDS)]
    assert all(alarmed)  # by a rubric that asked for completeness, it would be bad
