"""Decides how Slurm is asked: the few of its commands that are used, and what their answers mean.

It knows jobs and tasks; it knows nothing of stages, shards or why a job is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import MachineError, UserError

TIMEOUT = 120.0  # seconds that a command may take: a busy controller answers late
MAX_ARRAY_SIZE = 1001  # Slurm's own default, where there is no Slurm to ask
FIELDS = {"array": "%F", "index": "%K", "state": "%T", "node": "%N", "name": "%j", "reason": "%r", "comment": "%k"}
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)


class SlurmFailed(MachineError):
    """A command of Slurm's did not do what it was asked; the message is Slurm's own."""


@dataclass(frozen=True, kw_only=True)
class SlurmTask:
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


def installed() -> bool:
    return shutil.which("squeue") is not None


def tasks(names: Iterable[str]) -> list[SlurmTask]:
    """What waits or runs under these job names, every task of an array by itself.

    Raises:
        SlurmFailed: the controller did not answer.
    """
    asked = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", f"--format={'|'.join(FIELDS.values())}"]
    return list(_parsed(ask(asked)))


def _parsed(answer: str) -> Iterator[SlurmTask]:
    for line in answer.splitlines():
        values = dict(zip(FIELDS, line.split("|", len(FIELDS) - 1), strict=True))
        if values["state"] not in ENDED:
            index = int(values["index"]) if values["index"].isdigit() else None
            yield SlurmTask(**{**values, "index": index})  # type: ignore[arg-type]


def max_array_size() -> int:
    """One more than the highest index of a task."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else MAX_ARRAY_SIZE


def submit(script: str, options: Sequence[str]) -> str:
    """Puts a script into the queue; returns the job's id."""
    return ask(["sbatch", "--parsable", *options], given=script).strip().split(";")[0]


def cancel(jobs: Iterable[str]) -> None:
    if ids := list(jobs):
        ask(["scancel", *ids])


def ask(command: Sequence[str], *, given: str = "") -> str:
    """What a command of Slurm's prints.

    Raises:
        UserError: this machine does not have it.
        SlurmFailed: it failed, or took too long.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on this machine; run this where Slurm's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmFailed(f"{command[0]} did not answer within {TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        raise SlurmFailed(f"{' '.join(command[:2])}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
