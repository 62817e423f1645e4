"""Measures what a kill costs a training: GRPO at full size, uninterrupted and killed half way, measured by the truth.

    python -m benchmarks.training_kill_cost FOLDER [--student MODEL] [--scenes 1000]

FOLDER gets two runs of manifests/scenes-grpo with the same tables: `whole` is trained without interruption; `killed`
gets SIGKILL half way, between two checkpoints, and is started again. Prints the minutes, how many points of the curve
are equal in both, whether the weights are, and the quality of the two captioners on held-out scenes. Finished parts are
skipped. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.held_out import STUDENT, generate_captions, measure_captions, print_table, round_figures
from benchmarks.miniature import TABLES, render_manifest
from pipeline import config

STEP = re.compile(r"train: step (\d+)/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    whole, killed = (create_run(args.folder / name, args.student) for name in ("whole", "killed"))
    for command in ("plan", "run ingest", "run caption", "run rubric"):
        assert run_recap(whole, command) == 0, command
    for table in TABLES:
        if not (killed / table).exists():
            link_table(whole / table, killed / table)
    train = config.load(whole).sections["train"][""]
    minutes = {"whole": run_training(whole), "killed": run_training(killed, kill_at=train.steps // 2 + train.log_steps)}
    minutes["started again"] = run_training(killed)
    for name, passed in minutes.items():
        print(f"{name:16}{passed:8.1f} minutes")
    before, after = (read_curve(run) for run in (whole, killed))
    num_equal = sum(after.get(point) == value for point, value in before.items())
    print(f"{num_equal} of {len(before)} points of the curve are equal")
    same = len({(run / "model" / "model.safetensors").read_bytes() for run in (whole, killed)}) == 1
    print(f"the weights are {'the same' if same else 'different'}, bit for bit\n")
    captions = {run.name: generate_captions(str(run / "model"), args.scenes) for run in (whole, killed)}
    qualities = {name: measure_captions(texts) for name, texts in captions.items()}
    print_table(qualities)
    difference = abs(qualities["whole"].f1 - qualities["killed"].f1)
    print(f"F1 differs by {difference:.4f}")
    figures = {name: round_figures(quality) for name, quality in qualities.items()}
    result = {"minutes": minutes, "points": len(before), "alike": num_equal, "same": same, **figures}
    print(json.dumps({"benchmark": "training_kill_cost", **result}))
    sys.exit(difference > 0.01)


def create_run(run: Path, student: Path) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.toml").write_text(render_manifest(student))
    return run


def link_table(table: Path, to: Path) -> None:
    """Hard-links the files: a run's SQL refuses symbolic links, which lead out of its folder."""
    if table.is_dir():
        shutil.copytree(table, to, copy_function=os.link)
    else:
        os.link(table, to)


def run_recap(run: Path, command: str) -> int:
    return subprocess.run([sys.executable, "-m", "pipeline", *command.split(), "--run", str(run)]).returncode


def run_training(run: Path, *, kill_at: int | None = None) -> float:
    """Trains to the end, or kills the training at a step; returns the minutes. A finished model takes none."""
    start = time.monotonic()
    if (run / "model").exists():
        return 0.0
    command = [sys.executable, "-m", "pipeline", "run", "train", "--run", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            step = STEP.search(line)
            if kill_at is not None and step is not None and int(step[1]) >= kill_at:
                process.kill()
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.returncode == expected, f"the training of {run} ended with {process.returncode}"
    return round((time.monotonic() - start) / 60, 1)


def read_curve(run: Path) -> dict[tuple[int, str], float]:
    points = pq.read_table(run / "step" / "00000.parquet", columns=["step", "name", "value"]).to_pylist()
    return {(point["step"], point["name"]): point["value"] for point in points}


if __name__ == "__main__":
    main()
