"""Measures a judge's accuracy on sentences about held-out scenes, planted and natural. The last line is JSON.

Planted sentences are made from the truth, half of them false because one word is swapped. Natural ones are a
captioner's captions as they are, sentence by sentence; a sentence about a thing that was named before is false. The
truth of a sentence outside the grammar is not known: it counts for no accuracy, and has a line of its own. A verdict
that the judge could not give, or did not write as it was asked, is wrong. The judge is called by the score stage's
scorer, with its rubric.

    python -m benchmarks.judge [--judge MODEL] [--rubric scenes] [--captioner MODEL] [--world 90001]
        [--statements 4000] [--scenes 1000]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
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

    scene: int
    sort: str  # of its first claim: count, background, object or relation; or why it has none that counts
    is_direction: bool  # how two things lie to each other
    true: bool | None  # None: nothing here decides it
    verdict: bool | None  # of the judge; None: it gave none
    could_not_say: bool  # with a reason; otherwise a missing verdict is a failed request


def balanced_accuracy(outcomes: Sequence[Outcome]) -> float:
    """The mean of the judge's accuracies on true and on false sentences."""
    sides = [[o.verdict == o.true for o in outcomes if o.true is side] for side in (True, False)]
    return sum(sum(side) / len(side) for side in sides if side) / max(1, sum(bool(side) for side in sides))


def share_accepted(outcomes: Sequence[Outcome]) -> float:
    """Of the sentences that are not true, those that the judge believes."""
    false = [o.verdict is True for o in outcomes if not o.true]
    return sum(false) / len(false) if false else 0.0


def bootstrap_accuracy(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Over scenes: sentences about one picture are wrong together."""
    scenes = defaultdict[int, list[Outcome]](list)
    for outcome in outcomes:
        scenes[outcome.scene].append(outcome)
    groups = list(scenes.values())
    return bootstrap_interval(
        lambda drawn: balanced_accuracy([outcome for i in drawn for outcome in groups[i]]), len(groups), draws=300
    )


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
    config = judge.prepare(judge.Config(engine="judge", rubric=rubric), run=None, field="--rubric")
    if config.rubric.spec.unit != "sentence" or len(config.rubric.criteria) != 1:
        raise SystemExit(f"--rubric {rubric}: one with a single question about each sentence is needed")
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
            yield from list_outcomes(text, number, scenes[number], result)
    finally:
        engine.close()


def list_outcomes(text: str, number: int, scene: Scene, result: ScoreResult) -> Iterator[Outcome]:
    sentences = split_sentences(text)
    for criterion in result.criteria:
        place = int(criterion.id.rpartition("/")[2]) - 1
        reason, true = label_statement(sentences[place], scene, before=" ".join(sentences[:place]))
        claims = [claim for one in parse_caption(sentences[place]).sentences for claim in one.claims]
        sort = STRANGE if true is None or not claims else claims[0].kind
        yield Outcome(
            scene=number,
            sort=AGAIN if reason.endswith("was named before") else sort,
            is_direction=sort == "relation" and claims[0].value in DIRECTIONS,
            true=true,
            verdict=None if criterion.value is None else criterion.value > 0.5,
            could_not_say=criterion.value is None and criterion.reason is not None,
        )


def group_outcomes(outcomes: Sequence[Outcome]) -> Mapping[str, Sequence[Outcome]]:
    groups = {"all": [o for o in outcomes if o.true is not None]}
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
    columns = ("number", "true", "balanced accuracy", "95 % interval", "errors accepted", "cannot say", "failed")
    print(f"{name:20}" + "".join(f"{column:>18}" for column in columns))
    for group, those in group_outcomes(outcomes).items():
        low, high = bootstrap_accuracy(those)
        unknown = sum(o.could_not_say for o in those)
        failed = sum(o.verdict is None for o in those) - unknown
        known = [o.true for o in those if o.true is not None]
        share, accuracy, span = "-", "-", "-"
        if known:
            share, accuracy = f"{sum(known) / len(known):.2f}", f"{balanced_accuracy(those):.3f}"
            span = f"{low:.3f} to {high:.3f}"
        print(
            f"{group:20}{len(those):18}{share:>18}{accuracy:>18}{span:>18}{share_accepted(those):18.3f}"
            f"{unknown:18}{failed:18}"
        )


if __name__ == "__main__":
    main()
