"""Measures throughput and memory: many small JPEGs through all stages with the echo engine.

Prints images/s of each stage, ingest over a bare decode-and-hash loop on the same cores, and peak memory at both corpus
sizes. The last line is JSON.

    python -m benchmarks.scale [--images 10000 100000] [--workers 2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
from PIL import Image

SIDE = 128  # pixels
DISTINCT = 512  # images; a comment in each JPEG makes all files different
STAGES = ("ingest", "caption", "score", "filter", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="the working directory; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = [measure_corpus(Path(folder), num, args.workers) for num in args.images]
    print_results(results)


def measure_corpus(folder: Path, num_images: int, workers: int) -> dict[str, object]:
    photos, run = folder / f"photos{num_images}", folder / f"run{num_images}"
    write_photos(photos, num_images)
    run_recap("init", run, "--source", photos)
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("\n[curate]\n", "\n", 1))  # it would drop what looks alike
    bare = [measure_bare_rate(photos, workers)]
    rates, peak = {}, 0
    for stage in STAGES:
        seconds, memory = run_recap("run", stage, "--run", run, "--workers", workers)
        rates[stage], peak = num_images / seconds, max(peak, memory)
    captions = sum(pq.read_metadata(file).num_rows for file in (run / "caption").rglob("*.parquet"))
    assert captions == num_images, f"{captions} of {num_images} images were captioned"
    bare.append(measure_bare_rate(photos, workers))
    return {
        "images": num_images,
        "images_per_second": {stage: round(rate, 1) for stage, rate in rates.items()},
        "bare_decode_and_hash": round(median(bare), 1),
        "ingest_share": round(rates["ingest"] / median(bare), 3),
        "peak_mib": round(peak / 1024, 1),
    }


def write_photos(folder: Path, num: int) -> None:
    distinct = [render_photo(seed) for seed in range(DISTINCT)]
    for i in range(num):
        place = folder / f"{i // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        comment = f"{i:08d}".encode()
        data = distinct[i % DISTINCT]
        (place / f"{i:08d}.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x0a" + comment + data[2:])


def render_photo(seed: int) -> bytes:
    noise = random.Random(seed)
    small = Image.new("RGB", (16, 16))
    small.putdata([tuple(noise.randrange(256) for _ in range(3)) for _ in range(256)])
    out = BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def run_recap(*args: object) -> tuple[float, int]:
    """Wall seconds of a command, start-up included, and the peak memory of its largest process, KiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as messages:
        child = subprocess.Popen([sys.executable, "-m", "pipeline", *map(str, args)], stderr=messages)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            messages.seek(0)
            command, code = " ".join(map(str, args)), os.waitstatus_to_exitcode(status)
            raise SystemExit(f"recap {command} ended with {code}:\n{messages.read().decode()}")
    return seconds, usage.ru_maxrss


def measure_bare_rate(photos: Path, workers: int) -> float:
    """Images/s of reading, decoding and hashing alone, in `workers` processes."""
    files = sorted(photos.rglob("*.jpg"))[:20_000]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(decode_and_hash, files[:64])
        start = time.perf_counter()
        pool.map(decode_and_hash, files, chunksize=256)
        return len(files) / (time.perf_counter() - start)


def decode_and_hash(file: Path) -> str:
    data = file.read_bytes()
    with Image.open(BytesIO(data)) as image:
        image.load()
    return hashlib.sha256(data).hexdigest()


def print_results(results: list[dict[str, object]]) -> None:
    print(f"{'images':>9} " + " ".join(f"{stage + '/s':>10}" for stage in STAGES) + "   ingest/bare   peak MiB")
    for r in results:
        rates = " ".join(f"{rate:10,.0f}" for rate in r["images_per_second"].values())  # type: ignore[attr-defined]
        print(f"{r['images']:9,} {rates} {r['ingest_share']:13.2f} {r['peak_mib']:10.1f}")
    small, large = results
    growth = round(large["peak_mib"] / small["peak_mib"], 3)  # type: ignore[operator]
    print(f"peak memory of the larger corpus: {growth} times that of the smaller")
    print(json.dumps({"benchmark": "scale", "cores": os.cpu_count(), "results": results, "memory_growth": growth}))


if __name__ == "__main__":
    main()
