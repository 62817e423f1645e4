"""Decides what a job's script says: `[slurm]` of run.toml, and the plain text that sbatch is given.

A stage is one array; its task i makes block i of n with the command that a person types. What waits for what, and what
is in the queue already, is known by pipeline/slurm/submit.py.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline import config
from pipeline.config import Run, Section, key
from pipeline.execution.passes import Pass
from pipeline.storage import tables
from pipeline.storage.plan import format_spec

STAGES = (*config.STAGES, "server")  # what may have a table of its own in [slurm]
NO_GPU = frozenset({"echo", "openai"})  # engines that compute elsewhere, or nothing
MAX_TASKS = 1000  # of an array, unless num_tasks says otherwise


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for; `[slurm]` for all, `[slurm.STAGE]` for one stage's."""

    partition: str = key("", "empty: the cluster's default")
    account: str = key("", "who pays")
    qos: str = key("", "the quality of service")
    constraint: str = key("", "features that a node must have, e.g. a100")
    gpus: int = key(1, "GPUs of a task that runs a model; tasks that run none get none", least=0)
    workers: int = key(1, "processes of a task, each with a shard, an engine and GPUs of its own", least=1)
    cpus: int = key(4, "CPU cores of a task", least=1)
    memory: str = key("", "of a task, e.g. 64G; empty: the partition's default")
    time: str = key("", "the time limit, as Slurm writes it: 04:00:00, 1-12:00:00; empty: the partition's own")
    max_running: int = key(0, "tasks of an array that run at once; 0: as many as there is room for", least=0)
    directives: tuple[str, ...] = key((), "more options of sbatch, e.g. --exclusive or --mail-type=FAIL")
    setup: tuple[str, ...] = key((), "lines of shell before the command: module load, source, export")
    command: str = key("", "how recap is called there, e.g. apptainer exec --nv recap.sif recap; empty: this Python")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The rest of `[slurm]`, which is the same for all stages."""

    num_tasks: int = key(0, f"tasks of an array; 0: one for each shard, but at most {MAX_TASKS}", least=0, most=10**6)
    notice: int = key(300, "seconds before the time limit at which a task is told to stop", least=10)
    max_requeues: int = key(50, "how often a task that was stopped goes back into the queue", least=0)
    serve: tuple[str, ...] = key((), "engines that a job of their own serves (`recap serve`) while arrays ask them")
    serve_host: str = key(
        "0.0.0.0", "the address that a served engine listens on; all but 127.0.0.1 demand a key (api_key_env)"
    )
    serve_wait: int = key(3600, "seconds that a task waits for a served engine to be ready", least=1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[slurm]`, understood."""

    settings: Settings
    resources: Mapping[str, Resources]  # stage -> what its jobs ask for


def read_section(section: Section) -> Config:
    """Raises:
    ConfigError: a key or a stage that there is not, or a time limit that leaves no time to work.
    """
    section.refuse_unknown([*STAGES, *(f.name for cls in (Settings, Resources) for f in fields(cls))])
    settings = section.only(frozenset(f.name for f in fields(Settings))).parse(Settings)
    common = section.only(frozenset(f.name for f in fields(Resources)))
    resources = {}
    for stage in STAGES:
        own = section.sub(stage)
        if stage == "server" and "workers" in own.values:
            raise own.error("workers", "a server has none; set replicas in [engines.NAME.serve]")
        merged = Section({**common.values, **own.values}, file=own.file, field=own.field)
        resources[stage] = merged.parse(Resources)
        limit = seconds(resources[stage].time)
        if resources[stage].time and limit is None:
            raise merged.error("time", f"{resources[stage].time!r} is no time; write 90, 04:00:00 or 1-12:00:00")
        if limit is not None and limit <= settings.notice:
            raise merged.error("time", f"{resources[stage].time!r} is over before the notice of {settings.notice} s")
    return Config(settings=settings, resources=resources)


def seconds(limit: str) -> int | None:
    """A time limit as Slurm writes it; None when it is none.

    >>> seconds("90"), seconds("04:00:00"), seconds("1-12")
    (5400, 14400, 129600)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        return None
    days, a, b, c = (int(part or 0) for part in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return a * 60 + b


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
        return config.endpoint(self.run.file.parent.resolve(), engine)

    def resources(self, job: Job) -> Resources:
        found: Resources = self.run.slurm.resources[job.stage]
        return found

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
