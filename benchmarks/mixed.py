"""Measures raw alt texts, synthetic captions and a mixture of both by score, beside each other.

The run is the demo's, on scenes of a held-out world, with the alt texts as a caption pass of their own, which the same
judge rates. Mixed, an image has whichever of its two texts the judge rates higher. Printed are, of all texts and of
those that the demo's filter keeps, the share of images with one, the share of claims that are true, recall and F1 by
one-to-one matching, the share of texts wholly right, words, and the share of raw texts, each a mean over images with a
text, with 95 % intervals of F1 over images. No stage reads the truth of a scene; only the figures do. The last line is
JSON.

    python -m benchmarks.mixed FOLDER [--scenes 1000] [--world 91001]
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.held_out import bootstrap_interval
from benchmarks.repair import FAITHFUL, flatten_sections
from benchmarks.worlds import HELD_OUT, TEST
from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.sources.scenes import find_scene
from pipeline.storage import database
from stages.scenes.measure import Measure, measure_caption

RAW, SYNTHETIC, MIXED = "raw", "dense", "mixed by score"
RATED = """
    SELECT source_key, caption.name, text, value
    FROM image JOIN caption ON caption.key = image.key AND caption.status = 'ok'
    JOIN score ON score.key = image.key AND score.caption = caption.name AND score.name = 'judge'
    ORDER BY image.key, caption.name"""


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """A text of an image, with the judge's score and the truth."""

    caption: str  # its pass
    score: float
    measure: Measure
    num_words: int


def create_run(folder: Path, *, num_scenes: int, world: int) -> config.Run:
    """The demo's run on a held-out world, with the alt texts as captions."""
    values: dict[str, Any] = tomllib.loads((resources.files("manifests") / "demo" / "run.toml").read_text())
    values["source"] |= {"num_images": num_scenes, "seed": world, "broken_share": 0.0, "duplicate_share": 0.0}
    values["caption"][RAW] = {"words": "alt_text"}
    values["filter"]["choose"] = "judge DESC"
    if not folder.exists():
        init.create_run(folder, dict(flatten_sections(values)))
    return config.load(folder)


def choose_texts(rated: Mapping[str, Sequence[RatedText]], *, least: float) -> dict[str, dict[str, RatedText]]:
    """The text of each image, by way of choosing, among those with a score of at least `least`."""
    usable = {key: [one for one in texts if one.score >= least] for key, texts in rated.items()}
    chosen: dict[str, dict[str, RatedText]] = {
        name: {key: one for key, texts in usable.items() for one in texts if one.caption == name}
        for name in (RAW, SYNTHETIC)
    }
    chosen[MIXED] = {key: max(texts, key=lambda one: one.score) for key, texts in usable.items() if texts}
    return chosen


def summarise(texts: Sequence[RatedText], *, num_images: int) -> dict[str, float]:
    totals = [one.measure.total for one in texts]
    return {
        "images": len(texts) / num_images,
        "true claims": sum(total.num_true for total in totals) / max(1, sum(total.num_stated for total in totals)),
        "recall": fmean(total.recall for total in totals),
        "f1": fmean(total.f1 for total in totals),
        "wholly right": fmean(one.measure.is_wholly_right for one in texts),
        "words": fmean(one.num_words for one in texts),
        "raw": fmean(one.caption == RAW for one in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run; what is there already is not made again")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--world", type=int, default=TEST[0], choices=sorted(HELD_OUT))
    args = parser.parse_args()
    run = create_run(args.folder, num_scenes=args.scenes, world=args.world)
    state = RunState(run)
    assert Runner(state).execute(select_passes(state.passes, "all")).exit_code == 0
    rated = defaultdict[str, list[RatedText]](list)
    with database.connect_run(run) as connection:
        for source_key, caption, text, score in database.query_rows(connection, RATED):
            measure = measure_caption(text, find_scene(source_key))
            num_words = len(text.split())
            rated[source_key].append(
                RatedText(caption=caption, score=score or 0.0, measure=measure, num_words=num_words)
            )
    figures = {}
    for kept, least in (("all", 0.0), ("kept", FAITHFUL)):
        for name, texts in choose_texts(rated, least=least).items():
            label = f"{name}, {kept}"
            if texts:
                figures[label] = print_line(label, list(texts.values()), num_images=args.scenes)
    print(json.dumps({"benchmark": "mixed", "scenes": args.scenes, "figures": figures}))


def print_line(label: str, texts: Sequence[RatedText], *, num_images: int) -> dict[str, float]:
    values = summarise(texts, num_images=num_images)
    scores = [one.measure.total.f1 for one in texts]
    low, high = bootstrap_interval(lambda drawn: fmean(scores[i] for i in drawn), len(scores))
    columns = "".join(f"{key} {value:.3f}  " for key, value in values.items())
    print(f"{label:22}{columns}f1 {low:.3f} to {high:.3f}")
    return values


if __name__ == "__main__":
    main()
