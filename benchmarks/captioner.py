"""Compares captioners with teachers, their consensus and alt text by the truth. The last line is JSON.

Several models count as trainings of one captioner with several seeds: their mean and spread are printed too.

    python -m benchmarks.captioner [--scenes 1000] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
from statistics import mean, pstdev

from benchmarks.held_out import (
    CAPTIONER,
    generate_captions,
    measure_captions,
    print_table,
    read_alt_text,
    round_figures,
)
from benchmarks.teachers import measure_teachers

TEACHER = "hasty"  # the captioner learnt from its captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[CAPTIONER])
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    figures = measure_teachers(args.scenes)
    figures["alt text"] = measure_captions([read_alt_text(index) for index in range(args.scenes)])
    for model in args.models:
        figures[model] = measure_captions(generate_captions(model, args.scenes))
    print_table(figures)
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
