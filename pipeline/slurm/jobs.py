"""The jobs of a run at one moment: shards in progress, waiting tasks, and tasks that ended without an error message.

It reads Slurm's queue and the logs of the run's jobs; it knows no tables and nothing of what is done.
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
from pipeline.execution.run_state import RunState
from pipeline.slurm import scheduler
from pipeline.slurm.blocks import Job, ShardBlock, find_block, parse_block, plan_jobs
from pipeline.slurm.script import SlurmRun
from pipeline.storage.plan import format_spec, parse_spec

LAST_BYTES = 4096  # of a log; enough for its last line


@dataclass(frozen=True, kw_only=True)
class RunningTask:
    """A task that is making shards."""

    job: str  # 123_4
    node: str
    shards: str  # 40-49


@dataclass(frozen=True, kw_only=True)
class JobMonitor:
    """A run's jobs at one moment."""

    slurm_run: SlurmRun
    jobs: tuple[Job, ...]
    tasks: tuple[scheduler.QueuedTask, ...]
    problem: str  # why Slurm did not answer; "" when it did

    @classmethod
    def query_slurm(cls, state: RunState) -> JobMonitor:
        """Queries Slurm if it is installed and the run has been submitted."""
        slurm_run = SlurmRun(run=state.run, num_shards=state.plan.num_shards)
        jobs, tasks, problem = tuple(plan_jobs(state.passes)), list[scheduler.QueuedTask](), ""
        if slurm_run.folder.is_dir() and scheduler.is_installed():
            try:
                tasks = scheduler.list_tasks(slurm_run.job_names(jobs))
            except SlurmError as error:
                problem = str(error)
        return cls(slurm_run=slurm_run, jobs=jobs, tasks=tuple(tasks), problem=problem)

    def running_tasks(self, p: Pass) -> list[RunningTask]:
        return [
            RunningTask(
                job=task.id,
                node=task.node,
                shards=format_spec(parse_spec(f"{block.number}/{block.num_blocks}", block.num_shards)),
            )
            for task, block in self._tasks_of(p)
            if task.state != "PENDING"
        ]

    def num_workers(self, p: Pass) -> int:
        """Processes of all running tasks of a pass."""
        job = self._job_of(p)
        return (self.slurm_run.resources(job).workers if job else 1) * len(self.running_tasks(p))

    def pending_reasons(self, p: Pass) -> dict[str, int]:
        """Slurm's reason for waiting -> number of tasks."""
        return dict(Counter(task.reason for task, _ in self._tasks_of(p) if task.state == "PENDING"))

    def server_lines(self) -> Iterator[str]:
        """A line for each engine with a server in the queue."""
        for task in self.tasks:
            engine = task.name.removeprefix(f"{self.slurm_run.prefix}serve-")
            if engine != task.name:
                ready = "ready" if self.slurm_run.endpoint(engine).exists() else "not ready yet"
                yield f"serving {engine}: job {task.id}, {task.state} {task.node}".rstrip() + f", {ready}"

    def find_ended_early(self, p: Pass, shards: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Shards whose task ended with no message but its log: killed, out of memory, lost with its node."""
        job = self._job_of(p)
        if job is None:
            return
        queued = {block for _, block in self._tasks_of(p)}
        logs = self._find_logs().get(job.title.replace(":", "."), {})
        num_blocks, num_shards = self.slurm_run.num_blocks, self.slurm_run.num_shards
        for shard in shards:
            number = find_block(shard, num_blocks, num_shards)
            block = ShardBlock(number=number, num_blocks=num_blocks, num_shards=num_shards)
            if block not in queued and (log := logs.get(block)):
                yield shard, f"its task ended early ({_read_last_line(log) or 'with an empty log'}); see {log}"

    def _job_of(self, p: Pass) -> Job | None:
        return next((job for job in self.jobs if p in job.passes), None)

    def _tasks_of(self, p: Pass) -> Iterator[tuple[scheduler.QueuedTask, ShardBlock]]:
        job = self._job_of(p)
        for task in self.tasks:
            block = parse_block(task.comment, task.index)
            if job and block and task.name == self.slurm_run.prefix + job.title:
                yield task, block

    def _find_logs(self) -> Mapping[str, Mapping[ShardBlock, Path]]:
        """Title -> block -> the log of the last task that made it."""
        comments = dict(self._read_comments())
        logs: dict[str, dict[ShardBlock, Path]] = defaultdict(dict)
        names = (re.fullmatch(r"(.+)-(\d+)_(\d+)\.log", file.name) for file in self.slurm_run.logs.glob("*.log"))
        for name in sorted(filter(None, names), key=lambda name: int(name[2])):
            if block := parse_block(comments.get(name[2], ""), int(name[3])):
                logs[name[1]][block] = self.slurm_run.logs / name[0]
        return logs

    def _read_comments(self) -> Iterator[tuple[str, str]]:
        """Job -> the comment in its script."""
        for script in self.slurm_run.folder.glob("*.sh"):
            if comment := re.search(r"^#SBATCH --comment=(.*)$", script.read_text(), re.MULTILINE):
                yield script.stem.rpartition("-")[2], comment[1]


def _read_last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
