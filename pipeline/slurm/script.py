"""Job scripts: the names, directories and resources of a run's Slurm jobs, and the text that sbatch receives.

A stage is one array; its task i makes block i of n with the command that a person types. Dependencies between jobs, and
which jobs are already in the queue, belong to pipeline/slurm/submit.py.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.sections import MAX_TASKS, Resources, Run, endpoint_file
from pipeline.slurm.blocks import Job
from pipeline.storage import tables
from pipeline.storage.plan import format_spec

NO_GPU = frozenset({"echo", "openai"})  # engines that compute elsewhere, or not at all
TEMPLATES = Environment(  # values are quoted for the shell, never escaped as markup
    loader=PackageLoader("pipeline.slurm"),
    autoescape=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))


@dataclass(frozen=True, kw_only=True)
class JobArray:
    """Blocks of a job that have the same dependencies."""

    job: Job
    offset: int  # block of the task with index 0
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SlurmRun:
    """One run as Slurm sees it."""

    run: Run
    num_shards: int
    stale: str = "stop"  # `--stale` of its tasks

    @property
    def prefix(self) -> str:
        """The beginning of the name of every job of this run, and of no other run's."""
        return f"recap-{hashlib.sha256(str(self.run.folder.resolve()).encode()).hexdigest()[:8]}-"

    @property
    def num_blocks(self) -> int:
        return min(self.run.slurm.settings.num_tasks or MAX_TASKS, self.num_shards)

    @property
    def served(self) -> frozenset[str]:
        """Engines that a job of their own serves."""
        return frozenset(self.run.slurm.settings.serve)

    @property
    def folder(self) -> Path:
        """The directory of its job scripts and logs."""
        return self.run.folder.resolve() / "slurm"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def endpoint(self, engine: str) -> Path:
        """The file that the server of an engine writes when it is ready."""
        return endpoint_file(self.run.file.parent.resolve(), engine)

    def resources(self, job: Job) -> Resources:
        return self.run.slurm.resources[job.stage]

    def gpu_engines(self, job: Job) -> frozenset[str]:
        """The engines that compute in the job's own tasks, on GPUs."""
        return frozenset(name for name in job.engines - self.served if self.run.engines[name].kind not in NO_GPU)

    def render_array(self, array: JobArray) -> str:
        """The script of an array; complete, so that a person may pass it to sbatch."""
        return self._render_run(array.job, title=array.job.title, array=array, log="%A_%a")

    def render_whole(self, job: Job) -> str:
        """The script that writes what a stage makes of the whole run, after its last shard."""
        return self._render_run(job, title=f"{job.title}-whole", array=None, log="%j")

    def _render_run(self, job: Job, *, title: str, array: JobArray | None, log: str) -> str:
        resources = self.resources(job)
        return self._render_template(
            "run.sh.j2",
            title,
            resources,
            log=log,
            gpus=resources.gpus if array and self.gpu_engines(job) else 0,
            job=job,
            array=array,
            indices=format_spec(block - array.offset for block in array.blocks) if array else "",
            endpoints={engine: self.endpoint(engine) for engine in sorted(job.engines & self.served)},
        )

    def render_server(self, engine: str) -> str:
        """The script of the job that serves an engine until it is cancelled."""
        resources = self.run.slurm.resources["server"]
        return self._render_template(
            "server.sh.j2",
            f"serve-{engine}",
            resources,
            gpus=resources.gpus,
            engine=engine,
            endpoint=self.endpoint(engine),
        )

    def render_release(self, engine: str, server: str) -> str:
        """The script of the small job that cancels the job `server` when no other job uses its engine any more."""
        return self._render_template(
            "release.sh.j2", f"release-{engine}", self.run.slurm.resources["filter"], server=server
        )

    def save_script(self, title: str, job: str, text: str, dependency: str) -> None:
        """Keeps the script of a submitted job, for people and for `recap status`."""
        note = f"# submitted as {job}" + (f", after {dependency}" if dependency else "") + "\n"
        shebang, rest = text.split("\n", 1)
        with tables.open_atomic(self.folder / f"{title.replace(':', '.')}-{job}.sh") as file:
            file.write(f"{shebang}\n{note}{rest}".encode())

    def job_names(self, jobs: Iterable[Job]) -> list[str]:
        """The names of all jobs that this run may have in the queue."""
        titles = [title for job in jobs for title in (job.title, f"{job.title}-whole")]
        served = [f"{kind}-{name}" for kind in ("serve", "release") for name in sorted(self.served)]
        return [self.prefix + title for title in (*titles, *served)]

    def _render_template(
        self, template: str, title: str, resources: Resources, *, gpus: int = 0, log: str = "%j", **values: Any
    ) -> str:
        output = str(self.logs / f"{title.replace(':', '.')}-").replace("%", "%%")
        return TEMPLATES.get_template(template).render(
            job_name=self.prefix + title,
            output=f"{output}{log}.log",
            settings=self.run.slurm.settings,
            resources=resources,
            gpus=gpus,
            # -P: a package named `pipeline` in the directory of submission would shadow the installed one
            recap=resources.command or f"{shlex.quote(sys.executable)} -P -m pipeline",
            directory=self.run.file.parent.resolve(),
            prefix=self.prefix,
            num_blocks=self.num_blocks,
            num_shards=self.num_shards,
            stale=self.stale,
            **values,
        )
