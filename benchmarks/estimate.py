"""The accuracy of `recap estimate` on the demo's run.

    python -m benchmarks.estimate --times 25

makes the demo's corpus so many times as large, estimates the run from 256 images, runs it, and prints both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from pipeline.commands import demo, estimate
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.storage import database

DEMO_IMAGES = 400
TOKENS = "SELECT coalesce(sum(num_prompt_tokens + num_output_tokens), 0) FROM stats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=25, help="how many times the demo's images")
    parser.add_argument("--images", type=int, default=256, help="of the sample")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recap-estimate-") as folder:
        run = demo.create_demo(Path(folder) / "run", num_images=round(DEMO_IMAGES * arguments.times))
        start = time.monotonic()
        found = estimate.estimate_run(run, num_images=arguments.images)
        print(f"estimated in {time.monotonic() - start:.0f} s from {found.num_sampled} images", flush=True)
        start = time.monotonic()
        state = RunState(run)
        assert Runner(state).execute(state.passes).exit_code == 0
        seconds = time.monotonic() - start
        with database.connect_run(run) as connection:
            ((tokens,),) = database.query_rows(connection, TOKENS)
    print_comparison("tokens", found.tokens, float(tokens))
    print_comparison("seconds", found.hours.scale(3600), seconds)


def print_comparison(name: str, found: estimate.Range, actual: float) -> None:
    between = f"{found.value:,.0f} ({found.low:,.0f} to {found.high:,.0f})"
    print(f"{name:8} estimated {between}, took {actual:,.0f}: {found.value / actual - 1:+.1%}")


if __name__ == "__main__":
    main()
