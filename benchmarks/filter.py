"""Measures how filtering by the judge changes the precision of captions of held-out scenes. The last line is JSON.

A caption is kept when its score is at least the median of all, so at least half of them are.

    python -m benchmarks.filter [--scenes 2000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean, median

from benchmarks.held_out import (
    bootstrap_interval,
    generate_captions,
    list_scenes,
    make_parser,
    make_samples,
    open_engine,
)
from stages.scenes.measure import measure_caption
from stages.scorers import judge


def score_captions(captions: Sequence[str], model: str) -> list[float | None]:
    """The share of each caption's sentences that the judge confirms; None: it could not decide."""
    config = judge.prepare(judge.Config(engine="judge", rubric="scenes"), run=None, field="benchmark")
    judge_engine = open_engine(model)
    try:
        return [result.value for result in judge.score(make_samples(captions), config, {"judge": judge_engine})]
    finally:
        judge_engine.close()


def main() -> None:
    parser = make_parser(__doc__, num_scenes=2000)
    args = parser.parse_args()
    captions = [text or "(nothing)" for text in generate_captions(args.captioner, args.scenes)]
    scores = score_captions(captions, args.judge)
    least = median(value for value in scores if value is not None)
    kept = [value is not None and value >= least for value in scores]
    scenes = list_scenes(args.scenes)
    precision = [measure_caption(text, scene).total.precision for text, scene in zip(captions, scenes, strict=True)]

    def measure_gain(drawn: Sequence[int]) -> float:
        """The claim precision of the kept captions minus that of all."""
        return mean(precision[i] for i in drawn if kept[i]) - mean(precision[i] for i in drawn)

    whole = range(args.scenes)
    low, high = bootstrap_interval(measure_gain, args.scenes)
    print(f"{args.scenes} captions, {mean(kept):.3f} kept (judge >= {least:.3f})")
    print(f"claim precision: all {mean(precision):.3f}, kept {mean(precision[i] for i in whole if kept[i]):.3f}")
    print(f"gain {100 * measure_gain(whole):.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}")
    print(
        json.dumps(
            {"keep_rate": mean(kept), "all": mean(precision), "gain": measure_gain(whole), "interval": [low, high]}
        )
    )


if __name__ == "__main__":
    main()
