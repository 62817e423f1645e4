"""Measures a judge's accuracy on statements about held-out scenes, by kind. The last line is JSON.

Half of the statements are sentences of the captioner's captions; the others are made from the truth. Half of the true
ones are made false by swapping one word. The judge is called by the score stage's scorer, with its rubric.

    python -m benchmarks.judge [--statements 4000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
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
from stages.scenes.claims import KINDS, parse_caption
from stages.scenes.teachers import answer_statement, draw_statement
from stages.scorers import Sample, judge

PER_SCENE = 4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One statement, judged."""

    text: str
    kind: str  # of its first claim: count, background, object or relation
    own: bool  # from the captioner's caption
    true: bool
    verdict: bool | None  # of the judge; None: it gave none


def balanced_accuracy(outcomes: Sequence[Outcome]) -> float:
    """The mean of the judge's accuracies on true and on false statements."""
    sides = [[o.verdict == o.true for o in outcomes if o.true == side] for side in (True, False)]
    return sum(sum(side) / len(side) for side in sides if side) / sum(bool(side) for side in sides)


def bootstrap_accuracy(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    return bootstrap_interval(lambda drawn: balanced_accuracy([outcomes[i] for i in drawn]), len(outcomes), draws=300)


def draw_statements(num: int, captioner: str | None) -> Iterator[tuple[int, str, bool]]:
    """Yields scene, text, and whether it is from the captioner's caption; without a captioner all are made."""
    scenes = list_scenes(-(-num // PER_SCENE))
    captions = generate_captions(captioner, len(scenes)) if captioner else [""] * len(scenes)
    for index, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        rng = Random(f"statements/{index}")
        has_claims = any(sentence.claims for sentence in parse_caption(caption).sentences)
        for number in range(PER_SCENE):
            own = has_claims and number % 2 == 0
            yield index, draw_statement(scene, rng, text=caption if own else None), own


def judge_statements(statements: Sequence[tuple[int, str, bool]], model: str) -> Iterator[Outcome]:
    config = judge.prepare(judge.Config(engine="judge", rubric="scenes"), run=None, field="benchmark")
    samples = (
        Sample(key=f"{number:012d}", candidate=0, text=text, data=partial(render_image, index))
        for number, (index, text, _) in enumerate(statements)
    )
    judge_engine = open_engine(model)
    scenes = list_scenes(max(index for index, _, _ in statements) + 1)
    for (index, text, own), result in zip(
        statements, judge.score(samples, config, {"judge": judge_engine}), strict=True
    ):
        kind = parse_caption(text).sentences[0].claims[0].kind
        verdict = None if result.value is None else result.value > 0.5
        yield Outcome(text=text, kind=kind, own=own, true=answer_statement(text, scenes[index])[1], verdict=verdict)
    judge_engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statements", type=int, default=4000)
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--captioner", default=CAPTIONER, help="empty: make all statements from the truth")
    args = parser.parse_args()
    outcomes = list(judge_statements(list(draw_statements(args.statements, args.captioner or None)), args.judge))
    groups = {"all": outcomes}
    groups |= {kind: [o for o in outcomes if o.kind == kind] for kind in KINDS}
    groups |= {"captioner's own": [o for o in outcomes if o.own], "made": [o for o in outcomes if not o.own]}
    groups = {name: some for name, some in groups.items() if some}
    print(f"{'':18}{'number':>8}{'true':>8}{'balanced accuracy':>20}{'95 % interval':>18}{'unknown':>10}")
    for name, group in groups.items():
        low, high = bootstrap_accuracy(group)
        share, unknown = sum(o.true for o in group) / len(group), sum(o.verdict is None for o in group)
        span = f"{low:.3f} to {high:.3f}"
        print(f"{name:18}{len(group):8}{share:8.2f}{balanced_accuracy(group):20.3f}{span:>18}{unknown:10}")
    print(json.dumps({name: round(balanced_accuracy(group), 4) for name, group in groups.items()}))


if __name__ == "__main__":
    main()
