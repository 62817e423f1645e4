"""Slurm's commands: the few that are used, and how their output is parsed.

It knows jobs and tasks; it knows nothing of stages, of shards, or of a job's purpose.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import SlurmError, UserError

TIMEOUT = 120.0  # seconds for one command; a busy controller answers late
MAX_ARRAY_SIZE = 1001  # Slurm's own default, used where Slurm is not installed
FIELDS = {"array": "%F", "index": "%K", "state": "%T", "node": "%N", "name": "%j", "reason": "%r", "comment": "%k"}
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)


@dataclass(frozen=True, kw_only=True)
class QueuedTask:
    """A job, or one task of an array, that is waiting or running."""

    array: str  # the id that sbatch printed
    index: int | None  # in its array; None for a job that is not an array
    state: str  # PENDING, RUNNING, COMPLETING, ...
    node: str  # "" while it waits
    name: str
    reason: str  # why it waits: Priority, Dependency, JobArrayTaskLimit, ...
    comment: str

    @property
    def id(self) -> str:
        return self.array if self.index is None else f"{self.array}_{self.index}"


def is_installed() -> bool:
    return shutil.which("squeue") is not None


def list_tasks(names: Iterable[str]) -> list[QueuedTask]:
    """The waiting and running tasks with these job names, each task of an array by itself.

    Raises:
        SlurmError: the controller did not answer.
    """
    options = ["--noheader", "--array", f"--name={','.join(names)}", f"--format={'|'.join(FIELDS.values())}"]
    return list(_parse_tasks(run_command(["squeue", *options])))


def _parse_tasks(output: str) -> Iterator[QueuedTask]:
    for line in output.splitlines():
        values = dict(zip(FIELDS, line.split("|", len(FIELDS) - 1), strict=True))
        if values["state"] not in ENDED:
            index = int(values["index"]) if values["index"].isdigit() else None
            yield QueuedTask(**{**values, "index": index})  # type: ignore[arg-type]


def read_max_array_size() -> int:
    """One more than the highest index of a task."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_command(["scontrol", "show", "config"]), re.MULTILINE)
    return int(match[1]) if match else MAX_ARRAY_SIZE


def submit_script(script: str, options: Sequence[str]) -> str:
    """Submits a script with sbatch; returns the job's id."""
    return run_command(["sbatch", "--parsable", *options], stdin=script).strip().split(";")[0]


def cancel_jobs(jobs: Iterable[str]) -> None:
    if ids := list(jobs):
        run_command(["scancel", *ids])


def run_command(command: Sequence[str], *, stdin: str = "") -> str:
    """Runs one of Slurm's commands; returns its output.

    Raises:
        UserError: the command is not installed on this machine.
        SlurmError: it failed or timed out.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed; run this on a machine with Slurm's commands") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command[:2])}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
