"""Decides how Slurm is asked: the few of its commands that are used, and what their answers mean.

It knows jobs and tasks; it knows nothing of stages, shards or why a job is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import SlurmError, UserError

TIMEOUT = 120.0  # seconds that a command may take: a busy controller answers late
MAX_ARRAY_SIZE = 1001  # Slurm's own default, where there is no Slurm to ask
FIELDS = {"array": "%F", "index": "%K", "state": "%T", "node": "%N", "name": "%j", "reason": "%r", "comment": "%k"}
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)


@dataclass(frozen=True, kw_only=True)
class QueuedTask:
    """One job, or one task of an array, that is waiting or running."""

    array: str  # the id that sbatch gave
    index: int | None  # in its array; None for a job that is no array
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
    """What waits or runs under these job names, every task of an array by itself.

    Raises:
        SlurmError: the controller did not answer.
    """
    asked = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", f"--format={'|'.join(FIELDS.values())}"]
    return list(_parsed(run_command(asked)))


def _parsed(answer: str) -> Iterator[QueuedTask]:
    for line in answer.splitlines():
        values = dict(zip(FIELDS, line.split("|", len(FIELDS) - 1), strict=True))
        if values["state"] not in ENDED:
            index = int(values["index"]) if values["index"].isdigit() else None
            yield QueuedTask(**{**values, "index": index})  # type: ignore[arg-type]


def read_max_array_size() -> int:
    """One more than the highest index of a task."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_command(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else MAX_ARRAY_SIZE


def submit_script(script: str, options: Sequence[str]) -> str:
    """Puts a script into the queue; returns the job's id."""
    return run_command(["sbatch", "--parsable", *options], given=script).strip().split(";")[0]


def cancel_jobs(jobs: Iterable[str]) -> None:
    if ids := list(jobs):
        run_command(["scancel", *ids])


def run_command(command: Sequence[str], *, given: str = "") -> str:
    """What a command of Slurm's prints.

    Raises:
        UserError: this machine does not have it.
        SlurmError: it failed, or took too long.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on this machine; run this where Slurm's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command[:2])}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
