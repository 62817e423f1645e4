"""Compares captioners with teachers, their consensus and alt text by the truth. The last line is JSON.

Several models count as trainings of one captioner with several seeds: their mean and spread are printed too. For each
model the figures follow by number of things, with the 95 % interval over scenes, and by kind of claim.

    python -m benchmarks.captioner [--scenes 1000] [--world 90001] [MODEL ...]

The worlds of benchmarks/worlds.py that are for tests are opened only to report.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean, pstdev

from benchmarks.details import print_details
from benchmarks.held_out import (
    CAPTIONER,
    SEED,
    generate_captions,
    measure_captions,
    print_table,
    read_alt_text,
    round_figures,
)
from benchmarks.teachers import measure_teachers
from benchmarks.worlds import HELD_OUT

TEACHER = "hasty"  # the captioner learnt from its captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[CAPTIONER])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--world", type=int, default=SEED, choices=sorted(HELD_OUT))
    args = parser.parse_args()
    figures = measure_teachers(args.scenes, world=args.world)
    alt_texts = [read_alt_text(index, world=args.world) for index in range(args.scenes)]
    figures["alt text"] = measure_captions(alt_texts, world=args.world)
    captions = {model: generate_captions(model, args.scenes, world=args.world) for model in args.models}
    figures |= {model: measure_captions(texts, world=args.world) for model, texts in captions.items()}
    print_table(figures)
    for model, texts in captions.items():
        print_details(model, texts, world=args.world)
    f1 = [figures[model].f1 for model in args.models]
    share = mean(f1) / figures[TEACHER].f1
    print(f"captioner: F1 {mean(f1):.3f} +- {pstdev(f1):.3f} over {len(f1)} training(s),")
    print(f"{share:.3f} of its teacher's ({TEACHER})")
    print(
        json.dumps(
            {"lines": {name: round_figures(quality) for name, quality in figures.items()}, "share_of_teacher": share}
        )
    )


if __name__ == "__main__":
    main()
