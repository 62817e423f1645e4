"""Prints how captioners stand to the truth beside teachers, consensus and alt text. The last line is JSON.

Several models are taken as trainings of one captioner by several seeds: their mean and spread are printed too.

    python -m benchmarks.captioner [--scenes 1000] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
from statistics import mean, pstdev

from benchmarks.held_out import CAPTIONER, alt_text, captions, line, rounded, show
from benchmarks.teachers import committee

TEACHER = "hasty"  # whom the captioner learnt from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[CAPTIONER])
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    lines = committee(args.scenes)
    lines["alt text"] = line([alt_text(index) for index in range(args.scenes)])
    for model in args.models:
        lines[model] = line(captions(model, args.scenes))
    show(lines)
    reached = [lines[model].f1 for model in args.models]
    share = mean(reached) / lines[TEACHER].f1
    print(f"captioner: F1 {mean(reached):.3f} +- {pstdev(reached):.3f} over {len(reached)} training(s),")
    print(f"{share:.3f} of its teacher's ({TEACHER})")
    print(json.dumps({"lines": {name: rounded(one) for name, one in lines.items()}, "share_of_teacher": share}))


if __name__ == "__main__":
    main()
