"""Measures raw alt texts, synthetic captions and a mixture of both by score, beside each other.

The run is the demo's, on scenes of a held-out world, with the alt texts as a caption pass of their own, which the same
judge rates. Mixed, an image has whichever of its two texts the judge rates higher. Printed are, of all texts and of
those that the run's filter keeps: the share of images that have one, the share of all claims that are true, the means
over texts of recall and F1 by one-to-one matching and of words, the shares of texts wholly right and of raw ones, and
the 95 % interval of F1 over images; then how the F1 of a mixed text differs from that of the synthetic one of the same
image. No stage reads the truth of a scene; only the figures do. The last line is JSON.

    python -m benchmarks.mixed FOLDER [--scenes 1000] [--world 91001]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.demo_run import make_demo_run
from benchmarks.held_out import bootstrap_interval
from benchmarks.worlds import HELD_OUT, TEST
from pipeline.sources.scenes import find_scene
from pipeline.storage import database
from stages.scenes.measure import Measure, measure_caption

RAW, SYNTHETIC, MIXED = "raw", "dense", "mixed by score"
RATED = """
    SELECT source_key, caption.name, text, value, coalesce(keep, false)
    FROM image JOIN caption ON caption.key = image.key AND caption.status = 'ok'
    LEFT JOIN score ON score.key = image.key AND score.caption = caption.name AND score.name = 'judge'
    LEFT JOIN verdict ON verdict.key = image.key AND verdict.caption = caption.name
    ORDER BY image.key, caption.name"""
SECTIONS = {"caption.raw": {"words": "alt_text"}}


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """A text of an image, with the judge's score and the truth."""

    caption: str  # its pass
    score: float | None  # None: the judge could not say
    keep: bool  # by the filter
    measure: Measure
    num_words: int


def choose_texts(rated: Mapping[str, Sequence[RatedText]], *, kept: bool) -> dict[str, dict[str, RatedText]]:
    """The text of each image, by way of choosing: of all, or of those that the filter keeps."""
    usable = {key: [one for one in texts if one.keep or not kept] for key, texts in rated.items()}
    chosen: dict[str, dict[str, RatedText]] = {
        name: {key: one for key, texts in usable.items() for one in texts if one.caption == name}
        for name in (RAW, SYNTHETIC)
    }
    scored = {key: [one for one in texts if one.score is not None] for key, texts in usable.items()}
    chosen[MIXED] = {key: max(texts, key=lambda one: one.score or 0.0) for key, texts in scored.items() if texts}
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
    run = make_demo_run(args.folder, num_scenes=args.scenes, world=args.world, sections=SECTIONS)
    rated = defaultdict[str, list[RatedText]](list)
    with database.connect_run(run) as connection:
        for source_key, caption, text, score, keep in database.query_rows(connection, RATED):
            measure = measure_caption(text, find_scene(source_key))
            rated[source_key].append(
                RatedText(caption=caption, score=score, keep=keep, measure=measure, num_words=len(text.split()))
            )
    figures: dict[str, Mapping[str, float]] = {}
    for label, kept in (("all", False), ("kept", True)):
        chosen = choose_texts(rated, kept=kept)
        for name, texts in chosen.items():
            if texts:
                figures[f"{name}, {label}"] = print_line(
                    f"{name}, {label}", list(texts.values()), num_images=args.scenes
                )
        if both := sorted(chosen[MIXED].keys() & chosen[SYNTHETIC].keys()):
            pairs = [(chosen[MIXED][key].measure.total.f1, chosen[SYNTHETIC][key].measure.total.f1) for key in both]
            print_difference(label, pairs)
    print(json.dumps({"benchmark": "mixed", "scenes": args.scenes, "world": args.world, "figures": figures}))


def print_difference(label: str, pairs: Sequence[tuple[float, float]]) -> None:
    differences = [mixed - synthetic for mixed, synthetic in pairs]
    low, high = bootstrap_interval(lambda drawn: fmean(differences[i] for i in drawn), len(differences))
    print(f"mixed against synthetic, {label}: f1 {fmean(differences):+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


def print_line(label: str, texts: Sequence[RatedText], *, num_images: int) -> dict[str, float]:
    values = summarise(texts, num_images=num_images)
    scores = [one.measure.total.f1 for one in texts]
    low, high = bootstrap_interval(lambda drawn: fmean(scores[i] for i in drawn), len(scores))
    columns = "".join(f"{key} {value:.3f}  " for key, value in values.items())
    print(f"{label:22}{columns}f1 {low:.3f} to {high:.3f}")
    return values


if __name__ == "__main__":
    main()
