"""Measures what a kill costs a training: GRPO at its full size, in one go and killed half way, held against the truth.

    python -m benchmarks.resumed FOLDER [--student MODEL] [--scenes 1000]

FOLDER gets two copies of manifests/scenes-grpo that share their tables: `whole` trains in one go, `killed` gets SIGKILL
half way, between two checkpoints, and is started again. Printed are the minutes, the points of the curve that both have
alike, whether the weights are, and what the two captioners say of held-out scenes. What FOLDER has already is not made
again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.held_out import STUDENT, captions, line, rounded, show
from benchmarks.miniature import TABLES, of_student
from pipeline import config

STEP = re.compile(r"train: step (\d+)/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args()
    whole, killed = (begun(args.folder / name, args.student) for name in ("whole", "killed"))
    for what in ("plan", "run ingest", "run caption", "run rubric"):
        assert recap(whole, what) == 0, what
    for table in TABLES:
        if not (killed / table).exists():
            (killed / table).symlink_to((whole / table).absolute())
    train = config.load(whole).sections["train"][""]
    minutes = {"whole": trained(whole), "killed": trained(killed, kill_at=train.steps // 2 + train.log_steps)}
    minutes["started again"] = trained(killed)
    for name, passed in minutes.items():
        print(f"{name:16}{passed:8.1f} minutes")
    before, after = (curve(run) for run in (whole, killed))
    alike = sum(after.get(point) == value for point, value in before.items())
    print(f"{alike} of {len(before)} points of the curve are alike")
    same = len({(run / "model" / "model.safetensors").read_bytes() for run in (whole, killed)}) == 1
    print(f"the weights are {'the same' if same else 'others'}, bit for bit\n")
    lines = {run.name: line(captions(str(run / "model"), args.scenes)) for run in (whole, killed)}
    show(lines)
    apart = abs(lines["whole"].f1 - lines["killed"].f1)
    print(f"F1 differs by {apart:.4f}")
    figures = {name: rounded(one) for name, one in lines.items()}
    told = {"benchmark": "resumed", "minutes": minutes, "points": len(before), "alike": alike, "same": same, **figures}
    print(json.dumps(told))
    sys.exit(apart > 0.01)


def begun(run: Path, student: Path) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.toml").write_text(of_student(student))
    return run


def recap(run: Path, command: str) -> int:
    return subprocess.run([sys.executable, "-m", "pipeline", *command.split(), "--run", str(run)]).returncode


def trained(run: Path, *, kill_at: int | None = None) -> float:
    """Trains until it is done, or is killed at a step; returns the minutes that took. What is done is left alone."""
    begun = time.monotonic()
    if (run / "model").exists():
        return 0.0
    command = [sys.executable, "-m", "pipeline", "run", "train", "--run", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for told in process.stderr:
            sys.stderr.write(told)
            step = STEP.search(told)
            if kill_at is not None and step is not None and int(step[1]) >= kill_at:
                process.kill()
    meant = 0 if kill_at is None else -signal.SIGKILL
    assert process.returncode == meant, f"the training of {run} ended with {process.returncode}"
    return round((time.monotonic() - begun) / 60, 1)


def curve(run: Path) -> dict[tuple[int, str], float]:
    points = pq.read_table(run / "step" / "00000.parquet", columns=["step", "name", "value"]).to_pylist()
    return {(point["step"], point["name"]): point["value"] for point in points}


if __name__ == "__main__":
    main()
