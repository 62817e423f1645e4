"""Measures the cost of decoding images in isolation: `ProbePool` against bare loops on the same number of processes.

    python -m benchmarks.decode [--seconds 2] [--pairs 5] [--procs N]

Three ways to check the same JPEGs in memory take turns:
  plain   a loop over Pillow's full decode and SHA-256, the obvious code
  probe   a loop over `pipeline.decoding.images.probe`, in separate processes, which a bad file could kill
  pool    `ProbePool`, fed by one parent over pipes
The last line is JSON. Shares by CPU time count all processes, the parent included; a busy machine hardly affects them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.decoding.images import probe
from pipeline.decoding.probe_pool import ProbePool
from pipeline.machine import num_cores

SIZES = {"64 px": (64, 64), "224 px": (224, 224), "640 px": (640, 427), "12 MP": (4000, 3000)}


def make_photographs(size: tuple[int, int]) -> list[bytes]:
    """A dozen different photographs of `size`, too many for a cache."""
    import sklearn.datasets
    from PIL import Image

    folder = Path(sklearn.datasets.__file__).parent / "images"
    files = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.open(folder / name)
        for crop in range(6 if size[0] < 1000 else 1):
            file = io.BytesIO()
            photograph.crop((crop * 8, crop * 4, 600, 400)).resize(size).save(file, "JPEG", quality=85)
            files.append(file.getvalue())
    return files


def decode_plainly(data: bytes) -> str:
    from PIL import Image

    Image.open(io.BytesIO(data)).load()
    return hashlib.sha256(data).hexdigest()


WAYS: dict[str, Callable[[bytes], object]] = {"plain": decode_plainly, "probe": probe}


def run_bare_loop(way: str, file: str, num_images: int) -> None:
    """The process of a bare loop: waits for a line, then checks its images."""
    lengths, data = json.loads(Path(file).with_suffix(".json").read_text()), Path(file).read_bytes()
    files = [data[start : start + length] for start, length in lengths]
    WAYS[way](files[0])
    print("ready", flush=True)
    sys.stdin.readline()
    for one in islice(cycle(files), num_images):
        WAYS[way](one)
    print("done", flush=True)


def measure_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds that `work` took in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def time_bare_loops(way: str, file: Path, num_images: int, procs: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.decode", "--bare", way, str(file), str(num_images // procs)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(procs)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    ends = [(to, back) for to, back in pipes if to and back]
    for _, back in ends:
        back.readline()
    used = sum(read_cpu_seconds(process.pid) for process in started)

    def work() -> None:
        for to, _ in ends:
            to.write("go\n")
            to.flush()
        for _, back in ends:
            back.readline()

    wall, _ = measure_seconds(work)
    used = sum(read_cpu_seconds(process.pid) for process in started) - used
    for process in started:
        process.communicate()
    return wall, used


def time_pool(pool: ProbePool, files: list[bytes], num_images: int) -> tuple[float, float]:
    pids = [worker._process.pid for worker in pool._workers if worker._process]
    used = sum(map(read_cpu_seconds, pids))
    wall, own = measure_seconds(lambda: sum(1 for _ in pool.map(islice(cycle(files), num_images))))
    return wall, own + sum(map(read_cpu_seconds, pids)) - used


def read_cpu_seconds(pid: int) -> float:
    """User and system time of a running process, from the scheduler's nanosecond clock."""
    return time.clock_gettime(~pid << 3 | 2)


def measure_size(name: str, files: list[bytes], *, seconds: float, pairs: int, procs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ProbePool(num_procs=procs) as pool:
        file = Path(folder) / "corpus"
        file.write_bytes(b"".join(files))
        starts = [sum(map(len, files[:i])) for i in range(len(files))]
        file.with_suffix(".json").write_text(json.dumps(list(zip(starts, map(len, files), strict=True))))
        for _ in pool.map(islice(cycle(files), (200 if len(files) > 2 else 8) * procs)):
            pass  # all processes are up
        one = min(measure_seconds(lambda: [probe(data) for data in files])[0] for _ in range(5)) / len(files)
        num_images = int(seconds / one + 1) * procs
        took: dict[str, list[tuple[float, float]]] = {"plain": [], "probe": [], "pool": []}
        for _ in range(pairs):
            for way in WAYS:
                took[way].append(time_bare_loops(way, file, num_images, procs))
            took["pool"].append(time_pool(pool, files, num_images))
    rate = {way: num_images / statistics.median(wall for wall, _ in took[way]) for way in took}
    cost = {way: statistics.median(cpu for _, cpu in took[way]) / num_images for way in took}
    return {
        "images": name,
        "num_bytes": len(files[0]),
        "num_images": num_images,
        **{f"{way}_images_per_s": round(rate[way], 1) for way in took},
        **{f"{way}_cpu_ms": round(cost[way] * 1e3, 4) for way in took},
        "pool_per_plain": round(rate["pool"] / rate["plain"], 3),
        "pool_per_probe": round(rate["pool"] / rate["probe"], 3),
        "cpu_pool_per_plain": round(cost["plain"] / cost["pool"], 3),
        "cpu_pool_per_probe": round(cost["probe"] / cost["pool"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop, approximately")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--procs", type=int, default=num_cores())
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        run_bare_loop(args.bare[0], args.bare[1], int(args.bare[2]))
        return
    print(f"{args.procs} processes; images/s, medians of {args.pairs}; share = pool / loop, by wall and by CPU time")
    print(
        f"{'JPEGs':8} {'KB':>6} {'plain':>8} {'probe':>8} {'pool':>8}   {'share of plain':>16} {'share of probe':>16}"
    )
    rows = []
    for name, size in SIZES.items():
        row = measure_size(name, make_photographs(size), seconds=args.seconds, pairs=args.pairs, procs=args.procs)
        rows.append(row)
        print(
            f"{name:8} {row['num_bytes'] / 1000:6.1f}"
            + "".join(f" {row[f'{way}_images_per_s']:8.0f}" for way in ("plain", "probe", "pool"))
            + f" {row['pool_per_plain']:8.2f} {row['cpu_pool_per_plain']:7.2f}"
            + f" {row['pool_per_probe']:8.2f} {row['cpu_pool_per_probe']:7.2f}",
            flush=True,
        )
    print(json.dumps({"benchmark": "decode", "procs": args.procs, "pairs": args.pairs, "rows": rows}))


if __name__ == "__main__":
    main()
