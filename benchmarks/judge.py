"""Measures a judge's accuracy on sentences about held-out scenes, planted and natural. The last line is JSON.

Planted sentences are made from the truth, half of them false because one word is swapped. Natural ones are a
captioner's captions as they are, sentence by sentence; a sentence about a thing that was named before is false. The
judge is called by the score stage's scorer, with its rubric.

    python -m benchmarks.judge [--judge MODEL] [--rubric scenes] [--captioner MODEL] [--world 90001]
        [--statements 4000] [--scenes 1000]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from benchmarks.held_out import (
    CAPTIONER,
    JUDGE,
    bootstrap_interval,
    generate_captions,
    list_scenes,
    open_engine,
    render_image,
)
from benchmarks.worlds import CHOICE, HELD_OUT
from pipeline.sources.scenes import Scene
from pipeline.storage.sentences import split_sentences
from stages.scenes.claims import DIRECTIONS, KINDS, parse_caption
from stages.scenes.teachers import draw_statement, label_statement
from stages.scorers import Sample, ScoreResult, judge

PER_SCENE = 4
STRANGE, AGAIN, DIRECTION = "outside the grammar", "named before", "direction"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One sentence, judged."""

    sort: str  # of its first claim: count, background, object or relation; or why it has none that counts
    is_direction: bool  # how two things lie to each other
    true: bool
    verdict: bool | None  # of the judge; None: it could not say


def balanced_accuracy(outcomes: Sequence[Outcome]) -> float:
    """The mean of the judge's accuracies on true and on false sentences."""
    sides = [[o.verdict == o.true for o in outcomes if o.true == side] for side in (True, False)]
    return sum(sum(side) / len(side) for side in sides if side) / sum(bool(side) for side in sides)


def share_accepted(outcomes: Sequence[Outcome]) -> float:
    """Of the false sentences, those that the judge believes."""
    false = [o.verdict is True for o in outcomes if not o.true]
    return sum(false) / len(false) if false else 0.0


def bootstrap_accuracy(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    return bootstrap_interval(lambda drawn: balanced_accuracy([outcomes[i] for i in drawn]), len(outcomes), draws=300)


def draw_statements(scenes: Sequence[Scene]) -> Iterator[tuple[int, str]]:
    """Yields the number of a scene and a statement about it, several of each."""
    for number, scene in enumerate(scenes):
        rng = Random(f"statements/{scene.index}")
        for _ in range(PER_SCENE):
            yield number, draw_statement(scene, rng)


def judge_texts(
    texts: Sequence[tuple[int, str]], scenes: Sequence[Scene], *, model: str, rubric: str
) -> Iterator[Outcome]:
    """Each sentence of texts about scenes, which are named by their numbers."""
    config = judge.prepare(judge.Config(engine="judge", rubric=rubric), run=None, field="benchmark")
    samples = (
        Sample(
            key=f"{number:012d}",
            candidate=place,
            text=text,
            data=partial(render_image, scenes[number].index, world=scenes[number].seed),
        )
        for place, (number, text) in enumerate(texts)
    )
    engine = open_engine(model)
    try:
        for (number, text), result in zip(texts, judge.score(samples, config, {"judge": engine}), strict=True):
            yield from list_outcomes(text, scenes[number], result)
    finally:
        engine.close()


def list_outcomes(text: str, scene: Scene, result: ScoreResult) -> Iterator[Outcome]:
    sentences = split_sentences(text)
    for criterion in result.criteria:
        place = int(criterion.id.rpartition("/")[2]) - 1
        reason, true = label_statement(sentences[place], scene, before=" ".join(sentences[:place]))
        claims = [claim for one in parse_caption(sentences[place]).sentences for claim in one.claims]
        sort = STRANGE if true is None or not claims else claims[0].kind
        yield Outcome(
            sort=AGAIN if reason.endswith("was named before") else sort,
            is_direction=sort == "relation" and claims[0].value in DIRECTIONS,
            true=bool(true),
            verdict=None if criterion.value is None else criterion.value > 0.5,
        )


def group_outcomes(outcomes: Sequence[Outcome]) -> Mapping[str, Sequence[Outcome]]:
    groups = {"all": outcomes}
    groups |= {sort: [o for o in outcomes if o.sort == sort] for sort in (*KINDS, AGAIN, STRANGE)}
    groups[DIRECTION] = [o for o in outcomes if o.is_direction]
    return {name: some for name, some in groups.items() if some}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statements", type=int, default=4000)
    parser.add_argument("--scenes", type=int, default=1000, help="whose captions are judged")
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--rubric", default="scenes", help="of the judge")
    parser.add_argument("--captioner", default=CAPTIONER)
    parser.add_argument("--world", type=int, default=CHOICE, choices=sorted(HELD_OUT))
    args = parser.parse_args()
    scenes = list_scenes(max(-(-args.statements // PER_SCENE), args.scenes), world=args.world)
    captions = generate_captions(args.captioner, args.scenes, world=args.world)
    texts = {
        "planted": list(draw_statements(scenes))[: args.statements],
        "natural": [(number, text) for number, text in enumerate(captions) if text],
    }
    figures = {}
    for name, some in texts.items():
        outcomes = list(judge_texts(some, scenes, model=args.judge, rubric=args.rubric))
        print_outcomes(name, outcomes)
        figures[name] = {
            group: {"balanced": round(balanced_accuracy(those), 4), "accepted": round(share_accepted(those), 4)}
            for group, those in group_outcomes(outcomes).items()
        }
    print(json.dumps({"benchmark": "judge", **figures}))


def print_outcomes(name: str, outcomes: Sequence[Outcome]) -> None:
    columns = ("number", "true", "balanced accuracy", "95 % interval", "errors accepted", "cannot say")
    print(f"{name:20}" + "".join(f"{column:>18}" for column in columns))
    for group, those in group_outcomes(outcomes).items():
        low, high = bootstrap_accuracy(those)
        share, unknown = sum(o.true for o in those) / len(those), sum(o.verdict is None for o in those)
        span, accepted = f"{low:.3f} to {high:.3f}", share_accepted(those)
        print(
            f"{group:20}{len(those):18}{share:18.2f}{balanced_accuracy(those):18.3f}{span:>18}{accepted:18.3f}{unknown:18}"
        )


if __name__ == "__main__":
    main()
