"""Measures what repair brings: a caption loses the sentences that the judge refuses, and is judged again.

The run is the demo's, on scenes of a held-out world, with a caption pass of the repaired ones. Printed are the share of
images with a kept caption, and of the kept captions the share of claims that are true, the share of captions wholly
right, and the words, with the filter alone and with repair, with 95 % intervals over scenes of what repair changes. No
stage reads the truth of a scene; only the figures do. The last line is JSON.

    python -m benchmarks.repair FOLDER [--scenes 1000]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.demo_run import FAITHFUL, make_demo_run
from benchmarks.held_out import bootstrap_interval
from benchmarks.worlds import TEST
from pipeline.sources.scenes import find_scene
from pipeline.storage import database
from stages.scenes.measure import Measure, measure_caption

REPAIRED = {
    "words": "SELECT key, without_refused(text, judge_criteria) AS text, refused(text, judge_criteria) AS fields"
    " FROM dense",
    "where": f"judge < {FAITHFUL}",
    "of": "dense",
}
KEPT = """
    SELECT source_key, caption.text, verdict.caption = 'dense' AS is_first, caption.fields
    FROM image LEFT JOIN verdict ON verdict.key = image.key AND chosen
    LEFT JOIN caption ON caption.key = image.key AND caption.name = verdict.caption
        AND caption.candidate = verdict.candidate
    ORDER BY image.key"""

Kept = Sequence[Measure | None]  # of each image's kept caption; None: it has none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run; what is there already is not made again")
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    sections = {"caption.repaired": REPAIRED}
    run = make_demo_run(args.folder, num_scenes=args.scenes, world=TEST[0], sections=sections)
    with database.connect_run(run) as connection:
        rows = list(database.query_rows(connection, KEPT))
    after = [measure_caption(text, find_scene(key)) if text else None for key, text, *_ in rows]
    before = [measure if row[2] else None for row, measure in zip(rows, after, strict=True)]
    words = [len((row[1] or "").split()) for row in rows]
    figures = {"filter alone": summarise(before, words), "with repair": summarise(after, words)}
    for name, values in figures.items():
        print(f"{name:14}" + "".join(f"{key} {value:.3f}  " for key, value in values.items()))
    changes = {key: measure_change(before, after, words, key) for key in figures["with repair"]}
    for key, (change, low, high) in changes.items():
        print(f"{key}: {change:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    refused = 1 - figures["filter alone"]["kept"]
    print(f"repair keeps {changes['kept'][0] / refused:.2f} of what was refused")
    print(json.dumps({"benchmark": "repair", "scenes": len(rows), "figures": figures, "changes": changes}))


def summarise(kept: Kept, words: Sequence[int]) -> dict[str, float]:
    measures = [measure for measure in kept if measure]
    stated = sum(measure.total.num_stated for measure in measures)
    return {
        "kept": len(measures) / len(kept),
        "true claims": sum(measure.total.num_true for measure in measures) / stated,
        "wholly right": fmean(measure.is_wholly_right for measure in measures),
        "words": fmean(count for measure, count in zip(kept, words, strict=True) if measure),
    }


def measure_change(before: Kept, after: Kept, words: Sequence[int], key: str) -> tuple[float, float, float]:
    """The change of a figure by repair, with its interval over scenes."""

    def change(drawn: Sequence[int]) -> float:
        parts = ([kept[i] for i in drawn] for kept in (before, after))
        first, second = (summarise(part, [words[i] for i in drawn])[key] for part in parts)
        return second - first

    return change(range(len(words))), *bootstrap_interval(change, len(words), draws=400)


if __name__ == "__main__":
    main()
