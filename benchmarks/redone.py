"""Measures what a kill costs: how much engine work is done again on a shard that takes ten minutes.

    python -m benchmarks.redone [--seconds 600] [--kills 1]

A server answers each request after a set delay. `recap run caption` is killed with SIGKILL at a random moment of the
shard's second half and started again; what the server was asked twice is what the kill has cost. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from tests.support.faults import Faulty
from tests.support.runs import begin, make, picture, sections

IN_FLIGHT = 32  # requests
DELAY = 6.0  # seconds that an answer takes; one in the middle, for they differ by half of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="that the shard takes")
    parser.add_argument("--kills", type=int, default=1, help="one after the other; between two of them are 100 s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_images = round(args.seconds / DELAY * IN_FLIGHT)
    with tempfile.TemporaryDirectory() as folder, Faulty() as server:
        server.delay, server.jitter = DELAY, 0.5
        run = begun(Path(folder), num_images, server.url)
        noise = random.Random(args.seed)
        moments = [noise.uniform(0.5, 0.9) * args.seconds, *(noise.uniform(50, 150) for _ in range(args.kills - 1))]
        seconds = [kept_running(run, moment) for moment in moments if moment < args.seconds]
        seconds.append(kept_running(run, None))
        num_rows = pq.read_metadata(run / "caption" / "dense" / "00000.parquet").num_rows
        asked = Counter(hashlib.sha256(json.dumps(body).encode()).digest() for body in server.bodies)
    assert num_rows == len(asked) == num_images, (num_rows, len(asked), num_images)
    again = asked.total() - len(asked)
    print(f"a shard of {num_images:,} requests, {IN_FLIGHT} at once, each {DELAY:g} s or half of it more or less")
    print(f"killed after {', '.join(f'{s:.0f}' for s in seconds[:-1])} s, then done in {seconds[-1]:.0f} s")
    redone = again * DELAY / IN_FLIGHT / (len(seconds) - 1)
    print(f"{again:,} requests were asked twice: {redone:.1f} s of engine work are done again after a kill")
    print(json.dumps({"benchmark": "redone", "requests": num_images, "asked_twice": again, "seconds_redone": redone}))
    sys.exit(redone > 60)


def begun(folder: Path, num_images: int, url: str) -> Path:
    """A run of one shard that has its images."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(num_images):
        (photos / f"{number:05d}.jpg").write_bytes(picture(number))
    engine = {"kind": "openai", "model": "echo", "base_url": url, "max_in_flight": IN_FLIGHT}
    run = begin(folder / "run", sections(photos, source={"shard_size": num_images}, engines__captioner=engine))
    assert make(run, "ingest").exit_code == 0
    return run


def kept_running(run: Path, until: float | None) -> float:
    """Runs captions until they are done, or are killed; returns the seconds that took."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "caption", "--run", str(run)])
    try:
        process.wait(until)
        assert process.returncode == 0 and until is None, "the captions ended before they were killed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
