"""Decides what a job's script says: the plain text that sbatch is given.

A stage is one array; its task i makes block i of n with the command that a person types. What waits for what, and what
is in the queue already, is known by pipeline/slurm/submit.py.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.execution.passes import Pass
from pipeline.sections import MAX_TASKS, Resources, Run, endpoint_file
from pipeline.storage import tables
from pipeline.storage.plan import format_spec

NO_GPU = frozenset({"echo", "openai"})  # engines that compute elsewhere, or nothing


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, or one pass where a stage's passes wait for other stages between them."""

    title: str  # what `recap run` is given
    stage: str
    passes: tuple[Pass, ...]
    reads: frozenset[str]  # titles of the jobs that make what it reads
    engines: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class JobArray:
    """Some blocks of a job that wait for the same others."""

    job: Job
    offset: int  # block of the task with index 0
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SlurmRun:
    """One run as Slurm sees it."""

    run: Run
    num_shards: int
    stale: str = "stop"  # what its tasks do with stale tables

    @property
    def prefix(self) -> str:
        """What the names of all jobs of this run begin with, and no other run's."""
        return f"recap-{hashlib.sha256(str(self.run.folder.resolve()).encode()).hexdigest()[:8]}-"

    @property
    def num_blocks(self) -> int:
        return min(self.run.slurm.settings.num_tasks or MAX_TASKS, self.num_shards)

    @property
    def served(self) -> frozenset[str]:
        """Engines that have a job of their own."""
        return frozenset(self.run.slurm.settings.serve)

    @property
    def folder(self) -> Path:
        """Where the scripts and logs of its jobs lie."""
        return self.run.folder.resolve() / "slurm"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def endpoint(self, engine: str) -> Path:
        """The file that a served engine's server writes when it is ready."""
        return endpoint_file(self.run.file.parent.resolve(), engine)

    def resources(self, job: Job) -> Resources:
        return self.run.slurm.resources[job.stage]

    def on_gpus(self, job: Job) -> frozenset[str]:
        """The engines that compute in its own tasks, on GPUs."""
        return frozenset(name for name in job.engines - self.served if self.run.engines[name].kind not in NO_GPU)

    def array(self, array: JobArray) -> str:
        """The script of an array: plain text, complete, and good for `sbatch` by hand."""
        resources = self.resources(array.job)
        indices = format_spec(block - array.offset for block in array.blocks)
        throttle = f"%{resources.max_running}" if resources.max_running else ""
        num = self.num_blocks
        index = f"$((SLURM_ARRAY_TASK_ID + {array.offset}))" if array.offset else "$SLURM_ARRAY_TASK_ID"
        workers = f" --workers {resources.workers}" if resources.workers > 1 else ""
        return "\n".join(
            [
                *self._head(array.job.title, resources, gpus=bool(self.on_gpus(array.job)), log="%A_%a"),
                f"#SBATCH --array={indices}{throttle}",
                f"#SBATCH --comment=blocks={num},offset={array.offset},shards={self.num_shards}",
                "",
                f"# Each task makes one of {num} blocks of {self.num_shards} shards; what is done is skipped at once.",
                *resources.setup,
                f"block={index}",
                *self._signals(),
                *self._start(array.job, resources, f'{array.job.title} --shard "$block/{num}"{workers}'),
                *self._end('"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'),
            ]
        )

    def whole(self, job: Job) -> str:
        """The script that makes what a stage says of the whole run, after its last shard."""
        resources = self.resources(job)
        return "\n".join(
            [
                *self._head(f"{job.title}-whole", resources, gpus=False, log="%j"),
                "",
                f"# All shards are there: this makes what {job.title} writes of them together.",
                *resources.setup,
                *self._signals(),
                *self._start(job, resources, job.title),
                *self._end('"$SLURM_JOB_ID"'),
            ]
        )

    def server(self, engine: str) -> str:
        """The script of the job that serves an engine until it is cancelled."""
        settings, resources = self.run.slurm.settings, self.run.slurm.resources["server"]
        endpoint = shlex.quote(str(self.endpoint(engine)))
        return "\n".join(
            [
                *self._head(f"serve-{engine}", resources, gpus=True, log="%j"),
                "",
                "# Others find the server by the file that it writes when it is ready; that of a dead one misleads.",
                *resources.setup,
                f"rm -f {endpoint}",
                *self._signals("TERM"),
                f"{self._command(resources)} serve {engine} --host {settings.serve_host} --run {self._folder} &",
                *self._end('"$SLURM_JOB_ID"', stopped='[ -n "$told" ]'),
            ]
        )

    def release(self, engine: str, server: str) -> str:
        """The script of the small job that ends a server when nobody asks it any more."""
        resources = self.run.slurm.resources["filter"]
        return "\n".join([*self._head(f"release-{engine}", resources, gpus=False, log="%j"), "", f"scancel {server}"])

    def keep(self, title: str, job: str, text: str, dependency: str) -> None:
        """Keeps what was submitted, for people and for `recap status`."""
        wait = f"# submitted as {job}" + (f", after {dependency}" if dependency else "") + "\n"
        shebang, rest = text.split("\n", 1)
        with tables.atomic(self.folder / f"{title.replace(':', '.')}-{job}.sh") as file:
            file.write(f"{shebang}\n{wait}{rest}\n".encode())

    def names(self, found: Iterable[Job]) -> list[str]:
        """Of all jobs that this run may have in the queue."""
        titles = [title for job in found for title in (job.title, f"{job.title}-whole")]
        served = [f"{kind}-{name}" for kind in ("serve", "release") for name in sorted(self.served)]
        return [self.prefix + title for title in (*titles, *served)]

    @property
    def _folder(self) -> str:
        return shlex.quote(str(self.run.file.parent.resolve()))

    def _command(self, resources: Resources) -> str:
        # -P: the folder that one submits from may hold a `pipeline` of its own; that is not for Python to find.
        return resources.command or f"{shlex.quote(sys.executable)} -P -m pipeline"

    def _head(self, title: str, resources: Resources, *, gpus: bool, log: str) -> Iterator[str]:
        yield "#!/bin/bash"
        settings = self.run.slurm.settings
        output = str(self.logs / f"{title.replace(':', '.')}-").replace("%", "%%")
        options = {
            "job-name": self.prefix + title,
            "output": f'"{output}{log}.log"',
            "open-mode": "append",
            "requeue": None,
            "kill-on-invalid-dep": "yes",
            "signal": f"B:USR1@{settings.notice}",
            "time": resources.time,
            "partition": resources.partition,
            "account": resources.account,
            "qos": resources.qos,
            "constraint": f'"{resources.constraint}"' if resources.constraint else "",
            "gres": f"gpu:{resources.gpus}" if gpus and resources.gpus else "",
            "cpus-per-task": str(resources.cpus),
            "mem": resources.memory,
        }
        yield from (
            f"#SBATCH --{name}" + ("" if value is None else f"={value}")
            for name, value in options.items()
            if value != ""
        )
        yield from (f"#SBATCH {directive}" for directive in resources.directives)

    def _signals(self, passed_on: str = "USR1") -> Iterator[str]:
        """Slurm's notice reaches this shell alone: it is passed on, and the shell waits for what it started."""
        yield f'trap \'told=yes; [ -n "$child" ] && kill -{passed_on} "$child" 2>/dev/null\' USR1 TERM'

    def _start(self, job: Job, resources: Resources, what: str) -> Iterator[str]:
        command = f"{self._command(resources)} run {what} --run {self._folder}"
        command += "" if self.stale == "stop" else f" --stale {self.stale}"
        served = sorted(job.engines & self.served)
        if not served:
            yield f"{command} &"
            return
        yield "{"
        for engine in served:
            yield from self._wait_for(engine)
        yield f"  exec {command}"
        yield "} &"

    def _wait_for(self, engine: str) -> Iterator[str]:
        """Until a server is ready; not for one that has ended, or was never begun."""
        wait, name = self.run.slurm.settings.serve_wait, f"serve-{engine}"
        file = shlex.quote(str(self.endpoint(engine)))
        yield from f"""\
  # {engine} is served by another job; its file appears when it is ready. Slurm is asked about it once a minute.
  for ((waited = 0; waited < {wait}; waited += 5)); do
    [ -e {file} ] && break
    ((waited % 60)) || {{ found=$(squeue --noheader --name={self.prefix}{name}) && [ -z "$found" ] && break; }}
    sleep 5
  done
  if [ ! -e {file} ]; then
    echo "no server of {engine}: its job has ended, or was not ready in {wait} s; see slurm/logs/{name}-*.log" >&2
    exit 1
  fi
""".splitlines()

    def _end(self, me: str, *, stopped: str = '[ "$code" = 75 ] || [ -n "$told" -a "$code" -gt 128 ]') -> Iterator[str]:
        bound = self.run.slurm.settings.max_requeues
        yield from f"""\
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
wait "$child"
code=$?
# Told to stop, it has kept what is finished. This task alone goes back into the queue, unless Slurm is ending it
# already (scancel, scontrol requeue) or it has been back {bound} times.
me={me}
if {stopped}; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {bound} ]; then
    echo "told to stop after {bound} requeues: not queued again" >&2
  elif [ "$(squeue --noheader --jobs="$me" --format=%T)" = RUNNING ]; then
    scontrol requeue "$me"
  fi
fi
exit "$code"
""".splitlines()
