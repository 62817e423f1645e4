"""Measures `recap status` on a run of many shards: the first time, again, and after one file has changed.

Prints seconds of wall and CPU time; a busy machine affects the latter less. Every shard has all its tables, copies of
one shard's with the footer of their own place in the plan. Files beside them have the right size and no content. The
last line is JSON.

    python -m benchmarks.status [--shards 100000]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.storage import tables

SIZE = 4  # images in a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", help="the working directory; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        num_tables = create_run(run, args.shards)
        os.sync()
        time.sleep(3)
        first, before = time_status(run)
        assert all(p["done"] == args.shards for p in before), before
        again, after = time_status(run)
        assert after == before
        (run / "verdict" / f"{args.shards // 2:05d}.parquet").write_bytes(b"")
        changed, after_change = time_status(run)
        assert [p["missing"] for p in after_change if p["title"] == "filter"] == [str(args.shards // 2)]
        shutil.rmtree(run / ".work" / "stamps")
        _, rebuilt = time_status(run)
        assert rebuilt == after_change
        figures = {"first": first, "again": again, "one_changed": changed}
        print(json.dumps({"shards": args.shards, "tables": num_tables, **figures}), flush=True)


def create_run(run: Path, num_shards: int) -> int:
    """Makes a finished run; returns its number of tables."""
    sections = init.default_sections(
        {"kind": "scenes", "num_images": SIZE * num_shards, "shard_size": SIZE}, engine="echo", model=None
    )
    init.create_run(run, sections)
    first = RunState(config.load(run), shards="0")
    assert Runner(first).execute(select_passes(first.passes, "all")).exit_code == 0
    plan = RunState(config.load(run)).plan
    old = plan.digest(0)
    for p in first.passes:
        data, footer = (
            (run / p.folder / "00000.parquet").read_bytes(),
            tables.read_footer_text(run / p.folder / "00000.parquet"),
        )
        stats = (run / "stats" / p.folder / "00000.parquet").read_bytes()
        for shard in range(1, num_shards):
            own = edit_footer(footer, shard, inputs={} if p.reads else {old: plan.digest(shard)})
            (run / p.folder / f"{shard:05d}.parquet").write_bytes(data.replace(footer, own))
            if shard % 50 == 1:
                (run / "stats" / p.folder / f"{shard:05d}.parquet").write_bytes(stats)
            for name, size in json.loads(footer)["payload"].items():
                with open(run / name.replace("00000", f"{shard:05d}"), "xb") as file:
                    file.truncate(size)
    return num_shards * len(first.passes)


def edit_footer(footer: bytes, shard: int, *, inputs: Mapping[str, str]) -> bytes:
    """The footer for another shard, with its files and the digests of its inputs."""
    values = json.loads(footer)
    values.pop("check")
    given = values["recipe"]["inputs"]
    values["recipe"]["inputs"] = {folder: inputs.get(digest, digest) for folder, digest in given.items()}
    values["payload"] = {name.replace("00000", f"{shard:05d}"): size for name, size in values["payload"].items()}
    text = tables.format_footer(values).encode()
    assert len(text) == len(footer)
    return text


def time_status(run: Path) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Seconds of wall and CPU time, and the passes that it prints."""
    start, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "pipeline", "status", "--json", "--run", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"clock": round(time.monotonic() - start, 2), "cpu": round(used, 2)}, json.loads(done.stdout)


if __name__ == "__main__":
    main()
