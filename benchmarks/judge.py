"""Prints how often the judge is right about statements on held-out scenes, by kind. The last line is JSON.

Half of the statements are sentences of the captioner's own captions, the others are made from the truth; true ones are
made false by the swap of one word half of the time. The judge is asked by the score stage's own scorer and rubric.

    python -m benchmarks.judge [--statements 4000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from benchmarks.held_out import CAPTIONER, JUDGE, captions, engine, interval, picture, shown
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
    said: bool | None  # what the judge says; None: it could not


def balanced(outcomes: Sequence[Outcome]) -> float:
    """The mean of the shares of true and of false statements that are judged rightly."""
    sides = [[o.said == o.true for o in outcomes if o.true == side] for side in (True, False)]
    return sum(sum(side) / len(side) for side in sides if side) / sum(bool(side) for side in sides)


def spread(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    return interval(lambda drawn: balanced([outcomes[i] for i in drawn]), len(outcomes), draws=300)


def statements(num: int, captioner: str | None) -> Iterator[tuple[int, str, bool]]:
    """Scene, text and whether it is from the captioner's caption; without a captioner all are made."""
    scenes = shown(-(-num // PER_SCENE))
    said = captions(captioner, len(scenes)) if captioner else [""] * len(scenes)
    for index, (scene, caption) in enumerate(zip(scenes, said, strict=True)):
        rng = Random(f"statements/{index}")
        spoken = any(sentence.claims for sentence in parse_caption(caption).sentences)
        for number in range(PER_SCENE):
            own = spoken and number % 2 == 0
            yield index, draw_statement(scene, rng, text=caption if own else None), own


def judged(asked: Sequence[tuple[int, str, bool]], model: str) -> Iterator[Outcome]:
    config = judge.prepare(judge.Config(engine="judge", rubric="scenes"), run=None, field="benchmark")
    samples = (
        Sample(key=f"{number:012d}", candidate=0, text=text, data=partial(picture, index))
        for number, (index, text, _) in enumerate(asked)
    )
    judging = engine(model)
    scenes = shown(max(index for index, _, _ in asked) + 1)
    for (index, text, own), mark in zip(asked, judge.score(samples, config, {"judge": judging}), strict=True):
        kind = parse_caption(text).sentences[0].claims[0].kind
        said = None if mark.value is None else mark.value > 0.5
        yield Outcome(text=text, kind=kind, own=own, true=answer_statement(text, scenes[index])[1], said=said)
    judging.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statements", type=int, default=4000)
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--captioner", default=CAPTIONER, help="empty: all statements are made from the truth")
    args = parser.parse_args()
    outcomes = list(judged(list(statements(args.statements, args.captioner or None)), args.judge))
    groups = {"all": outcomes}
    groups |= {kind: found for kind in KINDS if (found := [o for o in outcomes if o.kind == kind])}
    groups |= {"captioner's own": [o for o in outcomes if o.own], "made": [o for o in outcomes if not o.own]}
    groups = {name: found for name, found in groups.items() if found}
    print(f"{'':18}{'number':>8}{'true':>8}{'balanced accuracy':>20}{'95 % interval':>18}{'unknown':>10}")
    for name, found in groups.items():
        low, high = spread(found)
        share, unknown = sum(o.true for o in found) / len(found), sum(o.said is None for o in found)
        span = f"{low:.3f} to {high:.3f}"
        print(f"{name:18}{len(found):8}{share:8.2f}{balanced(found):20.3f}{span:>18}{unknown:10}")
    print(json.dumps({name: round(balanced(found), 4) for name, found in groups.items()}))


if __name__ == "__main__":
    main()
