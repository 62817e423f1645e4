"""Measures what a kill costs: how much engine work is repeated on a shard that takes ten minutes.

    python -m benchmarks.kill_cost [--seconds 600] [--kills 1]

A server answers each request after a fixed delay. `recap run caption` is killed with SIGKILL at a random moment of the
shard's second half and started again; the requests that reach the server twice are the cost. The last line is JSON.
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
DELAY = 6.0  # seconds of an answer, plus or minus half of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of work in the shard")
    parser.add_argument("--kills", type=int, default=1, help="100 s apart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_images = round(args.seconds / DELAY * IN_FLIGHT)
    with tempfile.TemporaryDirectory() as folder, Faulty() as server:
        server.delay, server.jitter = DELAY, 0.5
        run = create_run(Path(folder), num_images, server.url)
        noise = random.Random(args.seed)
        moments = [noise.uniform(0.5, 0.9) * args.seconds, *(noise.uniform(50, 150) for _ in range(args.kills - 1))]
        seconds = [run_captions(run, moment) for moment in moments if moment < args.seconds]
        seconds.append(run_captions(run, None))
        num_rows = pq.read_metadata(run / "caption" / "dense" / "00000.parquet").num_rows
        requests = Counter(hashlib.sha256(json.dumps(body).encode()).digest() for body in server.bodies)
    assert num_rows == len(requests) == num_images, (num_rows, len(requests), num_images)
    num_repeated = requests.total() - len(requests)
    print(f"a shard of {num_images:,} requests, {IN_FLIGHT} in flight, each of {DELAY:g} s plus or minus half")
    print(f"killed after {', '.join(f'{s:.0f}' for s in seconds[:-1])} s, then finished in {seconds[-1]:.0f} s")
    repeated = num_repeated * DELAY / IN_FLIGHT / (len(seconds) - 1)
    print(f"{num_repeated:,} requests were repeated: a kill costs {repeated:.1f} s of engine work")
    figures = {"requests": num_images, "asked_twice": num_repeated, "seconds_redone": repeated}
    print(json.dumps({"benchmark": "kill_cost", **figures}))
    sys.exit(repeated > 60)


def create_run(folder: Path, num_images: int, url: str) -> Path:
    """A run of one shard, ingested."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(num_images):
        (photos / f"{number:05d}.jpg").write_bytes(picture(number))
    engine = {"kind": "openai", "model": "echo", "base_url": url, "max_in_flight": IN_FLIGHT}
    run = begin(folder / "run", sections(photos, source={"shard_size": num_images}, engines__captioner=engine))
    assert make(run, "ingest").exit_code == 0
    return run


def run_captions(run: Path, kill_after: float | None) -> float:
    """Runs `recap run caption` to its end or kills it; returns the seconds that it ran."""
    create_run = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "caption", "--run", str(run)])
    try:
        process.wait(kill_after)
        assert process.returncode == 0 and kill_after is None, "the captions ended before the kill"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - create_run


if __name__ == "__main__":
    main()
