"""Measures `recap run all` on a finished run of many shards, where nothing is left to do.

    python -m benchmarks.rerun [--shards 1000]

Prints the seconds of the whole command and of `recap --help`, medians of five; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.scale import write_photos
from pipeline.execution.state_index import SETTLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, run = Path(folder) / "photos", Path(folder) / "run"
        write_photos(photos, args.shards)
        time_recap("init", run, "--source", photos, "--shard-size", 1)
        time_recap("run", "all", "--run", run, "--workers", 2)
        time.sleep(SETTLED / 1e9)  # younger files are not cached
        time_recap("run", "all", "--run", run)  # it caches the footers
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        seconds = [(time_recap("run", "all", "--run", run), time_recap("--help")) for _ in range(args.pairs)]
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "the rerun changed files"
    rerun, help_ = (median(pair[i] for pair in seconds) for i in (0, 1))
    print(f"{args.shards:,} shards, {len(before):,} files: a rerun takes {rerun:.2f} s, `recap --help` {help_:.2f} s")
    print(json.dumps({"benchmark": "rerun", "shards": args.shards, "rerun_seconds": rerun, "help_seconds": help_}))


def time_recap(*args: object) -> float:
    """Wall seconds of a command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, args)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
