"""Measures how surely spoiled copies of captions find bad judges, and how often good ones are called bad.

Each judge rates a few captions and their spoiled copies, as `[canary]` has it of 2,000 captions with a share of 2 %,
with 100 seeds. Bad judges and perfect ones are functions of the truth of the sentences, which simulated teachers and
the shipped captioner wrote; the shipped judge looks at pictures. `right` counts the seeds in which a bad judge was
called bad for the right reason, `bad` those in which a judge was called bad, and `J < 0.5` those in which the plainer
rule J + 1.645 se < 0.5 for some kind of error, with J = P(yes | original) - P(yes | spoiled), is an alarm. The last
line is JSON.

    python -m benchmarks.health [--seeds 100] [--scenes 150] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from benchmarks.held_out import generate_captions, list_scenes, make_parser, open_engine, render_image
from pipeline.sources.scenes import Scene, draw_scene
from pipeline.storage.sentences import split_sentences
from pipeline.storage.words import count_words
from stages.audit.health import MIN_DETECTION, ONE_SIDED, Cause, Health, RatedCopy, examine_judge
from stages.audit.spoilers import spoil_text
from stages.rubrics import UNASKED
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import caption_scene
from stages.scorers import Sample, judge

NUM_CAPTIONS = 40  # of which copies are judged: 2 % of 2,000
NUM_TEACHERS = 240  # captions of the pool that a teacher wrote


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that a judge sees, with the truth of its sentences."""

    words: str
    image: int
    kind: str = ""  # of error; "": the original
    truth: tuple[bool, ...]  # by sentence
    before: tuple[bool, ...]  # of the original
    changed: tuple[int, ...] = ()  # the places of sentences that the original does not have there

    @property
    def candidate(self) -> int:
        return self.image % 4

    @property
    def num_words(self) -> int:
        return count_words(self.words)

    @property
    def is_right(self) -> bool:
        return all(self.truth)


Answer = Sequence[float | None]  # one value for a caption, or one for each sentence
Judge = Callable[[Text, Random], Answer]
Pool = Sequence[Sequence[Text]]  # captions, each followed by its spoiled copies


def make_pool(captions: Sequence[str], scenes: Sequence[Scene]) -> Pool:
    """Captions of the scenes, with their copies."""
    groups, other = [], None
    for index, (words, scene) in enumerate(zip(captions, scenes, strict=True)):
        sentences = split_sentences(words)
        before = find_truth(words, scene)
        original = Text(words=words, image=index, truth=before, before=before)
        copies = [
            replace(
                original,
                words=one.text,
                kind=one.kind,
                truth=find_truth(one.text, scene),
                changed=tuple(n for n, new in enumerate(split_sentences(one.text)) if [new] != sentences[n : n + 1]),
            )
            for one in spoil_text(words, seed=f"test/{index}", other=other)
        ]
        groups.append([original, *copies])
        other = words
    return groups


def make_teacher_pool() -> Pool:
    """Captions by a teacher that errs."""
    scenes = [draw_scene(5, index) for index in range(NUM_TEACHERS)]
    return make_pool([caption_scene("hasty", scene, index) for index, scene in enumerate(scenes)], scenes)


def find_truth(text: str, scene: Scene) -> tuple[bool, ...]:
    return tuple(measure_caption(one, scene).is_wholly_right for one in split_sentences(text))


def rate(pool: Pool, rater: Judge, seed: int) -> list[RatedCopy]:
    rng = Random(seed)
    found = []
    for number in rng.sample(range(len(pool)), NUM_CAPTIONS):
        original, *copies = pool[number]
        first = rater(original, rng)
        for text in copies:
            answer = rater(text, rng)
            is_swap = len(first) == len(text.truth) > 1
            changed = [value for place in text.changed if is_swap and (value := first[place]) is not None]
            found.append(
                RatedCopy(
                    kind=text.kind,
                    caption=str(number),
                    candidate=text.candidate,
                    original=find_mean(first),
                    copy=find_mean(answer),
                    accepted=min(changed, default=None),
                    num_words=(original.num_words, text.num_words),
                    sentences=tuple(answer) if len(answer) > 1 else (),
                )
            )
    return found


def find_mean(answer: Answer) -> float | None:
    known = [value for value in answer if value is not None]
    return sum(known) / len(known) if 2 * len(known) > len(answer) else None


def examine(pool: Pool, rater: Judge, seed: int) -> Health:
    return examine_judge(rate(pool, rater, seed), unasked=UNASKED)


def is_true(text: Text, _: Random) -> Answer:
    return [text.is_right]


def by_sentence(text: Text, _: Random) -> Answer:
    return [float(one) for one in text.truth]


def blind_to(*kinds: str, rater: Judge = by_sentence) -> Judge:
    return lambda text, rng: rater(replace(text, truth=text.before) if text.kind in kinds else text, rng)


def noisy(rater: Judge, *, share: float) -> Judge:
    """Answers of which a share is drawn at random."""
    return lambda text, rng: [one if rng.random() >= share else rng.random() < 0.5 for one in rater(text, rng)]


BAD: Mapping[str, tuple[Judge, Cause, str]] = {  # name -> judge, the cause and the kind of the first finding
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
    "blind to numbers, by caption": (blind_to("number", rater=is_true), "blind", "number"),
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


GOOD: Mapping[str, Judge] = {
    "perfect, by caption": is_true,
    "perfect, by sentence": by_sentence,
    "right in 95 %": noisy(by_sentence, share=0.1),
}


def ask_judge(pool: Pool, model: str) -> Judge:
    """The answers of a real judge to all sentences of the pool, each given once."""
    asked = sorted({(text.image, one) for group in pool for text in group for one in split_sentences(text.words)})
    settings = judge.prepare(judge.Config(engine="judge", rubric="scenes"), run=None, field="benchmark")
    samples = [
        Sample(key=f"{image:012d}", candidate=0, text=sentence, data=partial(render_image, image))
        for image, sentence in asked
    ]
    engine = open_engine(model)
    try:
        results = judge.score(samples, settings, {"judge": engine})
        values = {question: result.value for question, result in zip(asked, results, strict=True)}
    finally:
        engine.close()
    return lambda text, _: [values[text.image, one] for one in split_sentences(text.words)]


def is_alarm_by_difference(health: Health) -> bool:
    """The plainer rule: an alarm where J + 1.645 se < 0.5 for a kind that the rubric asks about."""
    asked = [one for one in health.detections if one.kind not in UNASKED and one.is_known]
    return any(one.difference + ONE_SIDED * one.standard_error(0.0) < MIN_DETECTION for one in asked)


def count_seeds(pool: Pool, rater: Judge, expected: tuple[Cause, str] | None, num_seeds: int) -> dict[str, int]:
    """In how many seeds a judge is called bad, by which rule, and for the expected cause and kind of error."""
    found = [examine(pool, rater, seed) for seed in range(num_seeds)]
    first = [(one.findings[0].cause, one.findings[0].kind) if one.findings else None for one in found]
    counts = {"bad": sum(one.is_bad for one in found), "plain": sum(map(is_alarm_by_difference, found))}
    return ({"right": first.count(expected)} if expected else {}) | counts


def main() -> None:
    parser = make_parser(__doc__, num_scenes=150)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    figures: dict[str, dict[str, int]] = {}
    for name, counts in measure_judges(args):
        figures[name] = counts
        right = f"{counts['right']:7}" if "right" in counts else f"{'':7}"
        print(f"{name:45}{right}{counts['bad']:6}{counts['plain']:9}", flush=True)
    print(json.dumps({"seeds": args.seeds, **figures}))


def measure_judges(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, int]]]:
    """The rows of the table; prints its headings."""
    teachers = make_teacher_pool()
    print(f"of {args.seeds} seeds, {NUM_CAPTIONS} captions with copies each:")
    print(f"{'bad judge':45}{'right':>7}{'bad':>6}{'J < 0.5':>9}")
    for name, (rater, cause, kind) in BAD.items():
        yield name, count_seeds(teachers, rater, (cause, kind), args.seeds)
    print(f"{'good judge':45}{'':7}{'bad':>6}{'J < 0.5':>9}")
    captions = [text or "(nothing)" for text in generate_captions(args.captioner, args.scenes)]
    shipped = make_pool(captions, list_scenes(args.scenes))
    for name, rater in GOOD.items():
        yield f"{name}, of a teacher's captions", count_seeds(teachers, rater, None, args.seeds)
        yield f"{name}, of the captioner's", count_seeds(shipped, rater, None, args.seeds)
    yield "the judge given, of the captioner's", count_seeds(shipped, ask_judge(shipped, args.judge), None, args.seeds)


if __name__ == "__main__":
    main()
