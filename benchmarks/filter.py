"""Prints what filtering by the judge does to the truth of captions on held-out scenes. The last line is JSON.

Captions are kept when the judge's score is at least the median of all, so at least half of them are.

    python -m benchmarks.filter [--scenes 2000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from statistics import mean, median

from benchmarks.held_out import CAPTIONER, JUDGE, captions, engine, interval, picture, shown
from stages.scenes.claims import count_claims
from stages.scorers import Sample, judge


def scores(said: Sequence[str], model: str) -> list[float | None]:
    """The share of each caption's sentences that the judge believes; None: it could not say."""
    config = judge.prepare(judge.Config(engine="judge", rubric="scenes"), run=None, field="benchmark")
    samples = (
        Sample(key=f"{index:012d}", candidate=0, text=text, data=partial(picture, index))
        for index, text in enumerate(said)
    )
    judging = engine(model)
    try:
        return [mark.value for mark in judge.score(samples, config, {"judge": judging})]
    finally:
        judging.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--captioner", default=CAPTIONER)
    args = parser.parse_args()
    said = [text or "(nothing)" for text in captions(args.captioner, args.scenes)]
    given = scores(said, args.judge)
    least = median(value for value in given if value is not None)
    kept = [value is not None and value >= least for value in given]
    precision = [count_claims(text, scene).precision for text, scene in zip(said, shown(args.scenes), strict=True)]

    def gain(drawn: Sequence[int]) -> float:
        """Claim precision of what is kept above that of all."""
        return mean(precision[i] for i in drawn if kept[i]) - mean(precision[i] for i in drawn)

    whole = range(args.scenes)
    low, high = interval(gain, args.scenes)
    print(f"{args.scenes} captions, {mean(kept):.3f} kept (judge >= {least:.3f})")
    print(f"claim precision: all {mean(precision):.3f}, kept {mean(precision[i] for i in whole if kept[i]):.3f}")
    print(f"gain {100 * gain(whole):.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}")
    print(json.dumps({"keep_rate": mean(kept), "all": mean(precision), "gain": gain(whole), "interval": [low, high]}))


if __name__ == "__main__":
    main()
