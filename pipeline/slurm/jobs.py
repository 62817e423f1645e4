"""Decides what is known of a run's jobs: which shards are being made where, which wait, and what ended without a word.

It asks Slurm's queue and reads the logs of the run's jobs; tables and what is done are not its concern.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SlurmError
from pipeline.execution.passes import Pass
from pipeline.execution.runner import Runner
from pipeline.slurm import scheduler
from pipeline.slurm.script import Job, SlurmRun
from pipeline.slurm.submit import ShardBlock, find_block, parse_block, plan_jobs
from pipeline.storage.plan import format_spec, parse_spec

LAST_BYTES = 4096  # of a log: its last line is in them


@dataclass(frozen=True, kw_only=True)
class RunningTask:
    """A task at work on some shards."""

    job: str  # 123_4
    node: str
    shards: str  # 40-49


@dataclass(frozen=True, kw_only=True)
class JobMonitor:
    """A run's jobs at one moment."""

    cluster: SlurmRun
    jobs: tuple[Job, ...]
    tasks: tuple[scheduler.QueuedTask, ...]
    problem: str  # why Slurm could not be asked; "" when it could

    @classmethod
    def of(cls, runner: Runner) -> JobMonitor:
        """Asks only where there is a Slurm and the run has been submitted."""
        cluster, found = SlurmRun(run=runner.run, num_shards=runner.plan.num_shards), tuple(plan_jobs(runner.passes))
        tasks, problem = list[scheduler.QueuedTask](), ""
        if cluster.folder.is_dir() and scheduler.is_installed():
            try:
                tasks = scheduler.list_tasks(cluster.names(found))
            except SlurmError as error:
                problem = str(error)
        return cls(cluster=cluster, jobs=found, tasks=tuple(tasks), problem=problem)

    def running(self, p: Pass) -> list[RunningTask]:
        return [
            RunningTask(job=task.id, node=task.node, shards=format_spec(self._shards(task)))
            for task in self._of(p)
            if task.state != "PENDING"
        ]

    def num_workers(self, p: Pass) -> int:
        """Processes of the tasks that are at work on it."""
        each = next((self.cluster.resources(job).workers for job in self.jobs if p in job.passes), 1)
        return each * len(self.running(p))

    def waiting(self, p: Pass) -> dict[str, int]:
        """Why tasks wait, in Slurm's words -> how many."""
        return dict(Counter(task.reason for task in self._of(p) if task.state == "PENDING"))

    def served(self) -> Iterator[str]:
        """A line for each engine that is served, or is going to be."""
        for task in self.tasks:
            engine = task.name.removeprefix(f"{self.cluster.prefix}serve-")
            if engine != task.name:
                ready = "ready" if self.cluster.endpoint(engine).exists() else "not ready yet"
                yield f"serving {engine}: job {task.id}, {task.state} {task.node}".rstrip() + f", {ready}"

    def silent(self, p: Pass, shards: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Shards whose task has ended and left no word but its log: killed, out of memory, lost with its node."""
        title, num_blocks, num_shards = self._title(p), self.cluster.num_blocks, self.cluster.num_shards
        queued = {parse_block(task.comment, task.index) for task in self._of(p)}
        logs = self._logs().get(title.replace(":", "."), {}) if title else {}
        for shard in shards:
            block = find_block(shard, num_blocks, num_shards)
            place = ShardBlock(block=block, num_blocks=num_blocks, num_shards=num_shards)
            if place not in queued and (log := logs.get(place)):
                yield shard, f"its task ended early ({_last_line(log) or 'without a word'}); see {log}"

    def _of(self, p: Pass) -> Iterator[scheduler.QueuedTask]:
        name = self.cluster.prefix + self._title(p)
        return (task for task in self.tasks if task.name == name and parse_block(task.comment, task.index) is not None)

    def _title(self, p: Pass) -> str:
        return next((job.title for job in self.jobs if p in job.passes), "")

    def _shards(self, task: scheduler.QueuedTask) -> Iterable[int]:
        place = parse_block(task.comment, task.index)
        assert place is not None
        return parse_spec(f"{place.block}/{place.num_blocks}", place.num_shards)

    def _logs(self) -> Mapping[str, Mapping[ShardBlock, Path]]:
        """Title -> place -> the log of the last task that had it."""
        comments = dict(self._submitted())
        found: dict[str, dict[ShardBlock, Path]] = defaultdict(dict)
        parsed = (re.fullmatch(r"(.+)-(\d+)_(\d+)\.log", file.name) for file in self.cluster.logs.glob("*.log"))
        for log in sorted((one for one in parsed if one), key=lambda one: int(one[2])):
            if place := parse_block(comments.get(log[2], ""), int(log[3])):
                found[log[1]][place] = self.cluster.logs / log[0]
        return found

    def _submitted(self) -> Iterator[tuple[str, str]]:
        """Job -> the comment in its script."""
        for script in self.cluster.folder.glob("*.sh"):
            if comment := re.search(r"^#SBATCH --comment=(.*)$", script.read_text(), re.MULTILINE):
                yield script.stem.rpartition("-")[2], comment[1]


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
