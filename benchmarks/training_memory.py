"""Measures the memory that a training takes per million images, by two steps on tables of two sizes.

The rows of a hundred scenes with a committee's rubrics are repeated, with keys and digests of their own. Memory is the
peak of anonymous pages, which the kernel cannot drop and read from a file again. The last line is JSON.

    python -m benchmarks.training_memory [--images 20000 200000]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.records import Caption, Image, ImageRubric, Record, make_key
from pipeline.storage import tables
from stages.scenes.teachers import TEACHERS

SIZE = 10_000  # images in a shard
DISTINCT = 100
TABLES: dict[str, type[Record]] = {"image": Image, "caption/hasty": Caption, "rubric/committee": ImageRubric}
TRAIN = {"steps": 2, "eval_images": 8, "num_workers": 0}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 2},
    "grpo": {"batch_size": 4, "group_size": 2, "max_tokens": 8, "rewards": {"committee": 1.0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[20_000, 200_000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", help="the working directory; by default a temporary one")
    args = parser.parse_args()
    few, many = args.images
    results = {}
    for method in args.methods:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            peaks = [measure_peak(create_run(Path(folder) / str(num), method, num)) for num in (few, many)]
        growth = (peaks[1] - peaks[0]) / (many - few) * 1_000_000
        results[method] = {"peak_mib": [round(mib) for mib in peaks], "mib_per_million_images": round(growth)}
        print(f"{method}: {peaks[0]:,.0f} MiB at {few:,} images, {peaks[1]:,.0f} MiB at {many:,}", flush=True)
    print(json.dumps({"benchmark": "training_memory", "images": args.images, **results}))


def create_run(run: Path, method: str, num_images: int) -> Path:
    """A run with this many images in its tables."""
    committee = [name for name in TEACHERS if name != "hasty"]
    sections: dict[str, dict[str, Any]] = {
        "source": {"kind": "scenes", "num_images": DISTINCT, "broken_share": 0.0, "duplicate_share": 0.0},
        **{f"engines.{name}": {"kind": "stages.scenes.teachers", "teacher": name} for name in TEACHERS},
        **{f"caption.{name}": {"recipe": "scenes", "engine": name} for name in TEACHERS},
        "rubric.committee": {"teachers": committee, "student": "hasty"},
        "score.committee": {"kind": "rubric", "rubric": "committee", "captions": ["hasty"]},
        "train": {"method": method, "captions": ["hasty"], **TRAIN, **METHODS[method]},
    }
    init.create_run(run, sections)
    state = RunState(config.load(run))
    for stage in ("ingest", "caption", "rubric"):
        assert Runner(state).execute(select_passes(state.passes, stage)).exit_code == 0, f"{stage} failed"
    for folder, record in TABLES.items():
        file = run / folder / "00000.parquet"
        rows, footer = list(tables.read_rows(file, record)), tables.read_footer(file)
        assert footer is not None and len(rows) == DISTINCT
        for shard in range(num_images // SIZE):
            repeated = (copy_row(rows[i % DISTINCT], shard, i) for i in range(SIZE))
            tables.write_rows(run / folder / f"{shard:05d}.parquet", record, repeated, footer.provenance, durable=False)
    return run


def copy_row(row: Any, shard: int, index: int) -> Any:
    key = make_key(shard, index)
    if not isinstance(row, Image):
        return replace(row, key=key)
    return replace(row, key=key, shard=shard, index=index, sha256=hashlib.sha256(key.encode()).hexdigest())


def measure_peak(run: Path) -> float:
    """Peak memory of a training without pages of files, MiB."""
    child = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "train", "--run", str(run)])
    peak = 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        time.sleep(0.02)
    assert child.returncode == 0, f"training in {run} ended with {child.returncode}"
    return peak / 1024


if __name__ == "__main__":
    main()
