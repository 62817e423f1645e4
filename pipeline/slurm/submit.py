"""Decides which jobs a run becomes: their blocks of shards, and what waits for what.

It keeps no queue of its own: what is on its way is what Slurm says, what is done is what the tables say.
"""

from __future__ import annotations

import fcntl
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

from pipeline import plugins
from pipeline.commands import serve
from pipeline.engines import openai
from pipeline.errors import ConfigError, RefusedError, SlurmError, UserError
from pipeline.execution.passes import Pass, select
from pipeline.execution.runner import Runner, Stale
from pipeline.execution.state_index import StateIndex
from pipeline.execution.states import DUE, Kind
from pipeline.progress import say
from pipeline.sections import Plugin, Run, endpoint_file
from pipeline.slurm import scheduler
from pipeline.slurm.script import Job, JobArray, SlurmRun
from pipeline.storage.plan import format_spec


def plan_jobs(passes: Sequence[Pass]) -> list[Job]:
    """The jobs of these passes, each after those that it reads from."""
    runs = [list(found) for _, found in groupby(passes, key=lambda p: p.stage)]
    stages = [run[0].stage for run in runs]
    parts = [part for run in runs for part in ([run] if stages.count(run[0].stage) == 1 else [[p] for p in run])]
    whole = [stages.count(part[0].stage) == 1 for part in parts]
    titles = [part[0].stage if one else part[0].title for part, one in zip(parts, whole, strict=True)]
    makers = {p.folder: title for part, title in zip(parts, titles, strict=True) for p in part}
    return [
        Job(
            title=title,
            stage=part[0].stage,
            passes=tuple(part),
            reads=frozenset(makers[folder] for p in part for folder in p.reads if folder in makers) - {title},
            engines=frozenset(engine for p in part for engine in p.engines),
        )
        for part, title in zip(parts, titles, strict=True)
    ]


def find_block(shard: int, num_blocks: int, num_shards: int) -> int:
    """Which of the blocks i/n of `parse_spec` has a shard."""
    return ((shard + 1) * num_blocks - 1) // num_shards


Put = Callable[[str, str, str], str]  # title, script, dependency -> the job's id
Busy = Mapping[tuple[str, int], str]  # title, block -> the array in Slurm's queue that has it


@dataclass(kw_only=True)
class Submission:
    """The jobs of one submission, each after those that it waits for."""

    cluster: SlurmRun
    jobs: Sequence[Job]  # of the whole run
    window: int  # tasks in an array, at most
    due: Mapping[str, Collection[int]]  # title of any job of the run -> its blocks that lack a table
    busy: Busy
    servers: Mapping[str, str]  # engine -> the job in the queue that serves it
    put: Put

    def lay(self, chosen: Sequence[Job]) -> int:
        """Puts into the queue all that is due and not there yet; returns how many tasks that is."""
        self._owner, self._servers = dict(self.busy), dict(self.servers)
        for job in chosen:
            before = len(self._owner)
            self._arrays(job)
            if len(self._owner) > before and any(p.finish for p in job.passes) and self.cluster.num_blocks > 1:
                self.put(f"{job.title}-whole", self.cluster.whole(job), f"afterok:{':'.join(self._ids([job]))}")
        num = len(self._owner) - len(self.busy)
        for engine in sorted(self.cluster.served):
            users = self._ids(job for job in self.jobs if engine in job.engines)
            if users and (num or engine not in self.servers):
                text = self.cluster.release(engine, self._server(engine))
                self.put(f"release-{engine}", text, f"afterany:{':'.join(users)}")
        return num

    def _arrays(self, job: Job) -> None:
        previous = max(self._ids([job]), key=int, default="") if self.busy else ""
        for (number, waits), blocks in sorted(self._groups(job).items()):
            conditions = [f"aftercorr:{':'.join(waits)}"] if waits else []
            conditions += [f"after:{self._server(name)}" for name in sorted(job.engines & self.cluster.served)]
            if previous and self.cluster.resources(job).max_running:
                conditions.append(f"afterany:{previous}")
            array = JobArray(job=job, offset=number * self.window, blocks=tuple(blocks))
            title = job.title + (f".{number}" if number else "")
            previous = self.put(title, self.cluster.array(array), ",".join(conditions))
            self._owner.update({(job.title, block): previous for block in blocks})

    def _groups(self, job: Job) -> dict[tuple[int, tuple[str, ...]], list[int]]:
        """Blocks to make by their window and the arrays that they wait for; not those whose inputs nobody makes."""
        groups = defaultdict(list)
        without: dict[str, list[int]] = defaultdict(list)
        for block in sorted(self.due[job.title]):
            if (job.title, block) in self._owner:
                continue
            for title in (lacking := [t for t in sorted(job.reads) if self._lacks(t, block)]):
                without[title].append(block)
            if not lacking:
                waits = sorted({self._owner[title, block] for title in job.reads if (title, block) in self._owner})
                groups[block // self.window, tuple(waits)].append(block)
        for title, blocks in without.items():
            say(f"{job.title}: blocks {format_spec(blocks)} left out, they need {title}, which nobody is making")
        return groups

    def _lacks(self, title: str, block: int) -> bool:
        return block in self.due[title] and (title, block) not in self._owner

    def _server(self, engine: str) -> str:
        if engine not in self._servers:
            self._servers[engine] = self.put(f"serve-{engine}", self.cluster.server(engine), "")
        return self._servers[engine]

    def _ids(self, found: Iterable[Job]) -> list[str]:
        titles = {job.title for job in found}
        return sorted({array for (title, _), array in self._owner.items() if title in titles})


def select_jobs(run: Run, what: Sequence[str], *, stale: Stale) -> tuple[Runner, list[Job]]:
    """The run and the jobs that `what` names, each STAGE, STAGE:NAME or `all`.

    Raises:
        UserError: the run is not right, a name is unknown, or something is stale and `stale` is "stop".
    """
    for name in run.slurm.settings.serve:
        check_served(run, name)
    runner = Runner(run=run, stale=stale)
    chosen = {p.folder for one in what for p in select(runner.passes, one)}
    overview = StateIndex(runner.ledger, runner.plan, runner.passes)  # without it, every stamp would be read
    runner.check_stale([p for p in runner.passes if p.folder in chosen and overview.shards(p, "stale")])
    found = [job for job in plan_jobs(runner.passes) if {p.folder for p in job.passes} & chosen]
    for job in found:
        check_gpus(SlurmRun(run=run, num_shards=runner.plan.num_shards), job)
    return runner, found


def check_served(run: Run, name: str) -> None:
    """Before a job waits an hour for a server that cannot start, or that nobody would ask.

    Raises:
        ConfigError: there is no such engine, it is not asked by its endpoint, or its server would be open to everyone.
    """
    if name not in run.engines:
        raise ConfigError(f"{run.file}: slurm.serve", plugins.explain_unknown(name, sorted(run.engines)))
    found, host = run.engines[name].config, run.slurm.settings.serve_host
    if not isinstance(found, openai.Config) or found.base_url != str(endpoint_file(run.file.parent, name)):
        wanted = 'kind = "openai" and base_url = "endpoint"'
        raise ConfigError(f"{run.file}: engines.{name}", f"slurm.serve gives it a server; to be asked it has {wanted}")
    if not serve.is_loopback(host) and not found.api_key_env:
        raise ConfigError(f"{run.file}: engines.{name}", serve.needs_key(host))


def check_gpus(cluster: SlurmRun, job: Job) -> None:
    """Before a cluster lends GPUs that no process would use, or fewer than every process needs.

    Raises:
        ConfigError: the workers of a task cannot use as many as it asks for, or would have too few.
    """
    asked, file = cluster.resources(job), cluster.run.file
    each = {name: count_gpus(cluster.run.engines[name]) for name in cluster.on_gpus(job)}
    if not each:
        return
    users = ", ".join(f"engines.{name}" for name in sorted(each))
    least = max(num or 0 for num in each.values())  # 0: none says it; it may compute on the CPU, or elsewhere
    if 0 < asked.gpus < (need := asked.workers * least):
        fewer = f", or workers = {asked.gpus // least}" if asked.gpus >= least else ""
        raise ConfigError(
            f"{file}: slurm.{job.stage}.gpus",
            f"{asked.gpus} are too few: workers = {asked.workers}, and each needs {least} for {users}; "
            f"set gpus = {need}{fewer}, or gpus = 0 to compute on the CPU",
        )
    size = max(num or asked.gpus for num in each.values())
    if asked.gpus > (most := asked.workers * size):
        more = f", or workers = {asked.gpus // size}" if asked.gpus // size > asked.workers else ""
        raise ConfigError(
            f"{file}: slurm.{job.stage}.gpus",
            f"of {asked.gpus} no more than {most} would be used: workers = {asked.workers}, and each has {size} for "
            f"{users}; set gpus = {most}{more}",
        )
    shards = -(-cluster.num_shards // cluster.num_blocks)
    if asked.workers > shards:
        say(
            f"recap: {file}: slurm.{job.stage}.workers: a task has {shards} shards for {asked.workers} workers; "
            f"with slurm.num_tasks = {max(1, cluster.num_shards // asked.workers)} each has one, with fewer tasks more"
        )


def count_gpus(engine: Plugin) -> int | None:
    """How many GPUs one process of an engine uses; None where its section does not say it."""
    if engine.kind == "transformers":
        return 1
    if not hasattr(engine.config, "tensor_parallel_size"):
        return None
    sizes = {"tensor_parallel_size": engine.config.tensor_parallel_size, **getattr(engine.config, "extra", {})}
    return prod(int(sizes.get(f"{how}_parallel_size", 1)) for how in ("tensor", "pipeline", "data"))


def render_scripts(runner: Runner, chosen: Sequence[Job]) -> Iterator[str]:
    """What `submit` would submit if nothing were in the queue, for people to read and to change.

    Several begin with a line each that is no script's first, so that sbatch refuses them as one, instead of running
    just the first.
    """
    texts: list[tuple[str, str]] = []

    def put(title: str, text: str, dependency: str) -> str:
        shebang, rest = text.split("\n", 1)
        wait = f"# submit with: sbatch --dependency='{dependency}'\n" if dependency else ""
        texts.append((title, f"{shebang}\n{wait}{rest}\n"))
        return f"<{title}>"

    cluster, found = (
        SlurmRun(run=runner.run, num_shards=runner.plan.num_shards, stale=runner.stale),
        plan_jobs(runner.passes),
    )
    try:
        window = scheduler.read_max_array_size()
    except (SlurmError, UserError):  # a machine without Slurm may still show what would be submitted
        window = scheduler.MAX_ARRAY_SIZE
    asked = {job.title for job in chosen}  # what the others lack is not this script's concern
    due = {
        title: blocks if title in asked else [] for title, blocks in find_missing_blocks(cluster, runner, found).items()
    }
    Submission(cluster=cluster, jobs=found, window=window, due=due, busy={}, servers={}, put=put).lay(chosen)
    for number, (title, text) in enumerate(texts, 1):
        yield (f"# {title}: script {number} of {len(texts)}, a file of its own\n" if texts[1:] else "") + text


def submit_jobs(runner: Runner, chosen: Sequence[Job]) -> int:
    """Submits what is missing and not in the queue already; returns how many tasks that is.

    Raises:
        RefusedError: jobs of this run with other blocks are in the queue, or somebody else submits right now.
        SlurmError: Slurm would not take a job; those before it are in the queue, and another `submit` goes on.
    """
    cluster, found = (
        SlurmRun(run=runner.run, num_shards=runner.plan.num_shards, stale=runner.stale),
        plan_jobs(runner.passes),
    )
    placed: list[str] = []
    serving = f"{cluster.prefix}serve-"

    def put(title: str, text: str, dependency: str) -> str:
        if title.startswith("serve-"):
            cluster.endpoint(title.removeprefix("serve-")).unlink(missing_ok=True)  # of a server that is dead
        job = scheduler.submit_script(text, [f"--dependency={dependency}"] if dependency else [])
        placed.append(cluster.prefix + title)
        cluster.keep(title, job, text, dependency)
        say(f"{job}: {title}" + (f", after {dependency}" if dependency else ""))
        return job

    with lock_submission(cluster.folder):
        queued = scheduler.list_tasks(cluster.names(found))
        chain = Submission(
            cluster=cluster,
            jobs=found,
            window=scheduler.read_max_array_size(),
            due=find_missing_blocks(cluster, runner, found),
            busy=find_queued_blocks(cluster, queued),
            servers={t.name.removeprefix(serving): t.array for t in queued if t.name.startswith(serving)},
            put=put,
        )
        num = chain.lay(chosen)
        scheduler.cancel_jobs(
            t.array for t in queued if t.index is None and t.name in placed
        )  # their successors wait for more
    return num


def find_queued_blocks(cluster: SlurmRun, queued: Iterable[scheduler.QueuedTask]) -> dict[tuple[str, int], str]:
    """Title and block of every task that waits or runs -> its array.

    Raises:
        RefusedError: its blocks are not those that would be submitted now.
    """
    found = {}
    for task in queued:
        if (place := parse_block(task.comment, task.index)) is None:
            continue
        if (place.num_blocks, place.num_shards) != (cluster.num_blocks, cluster.num_shards):
            keep = f", or set slurm.num_tasks = {place.num_blocks}" if place.num_shards == cluster.num_shards else ""
            raise RefusedError(
                f"{task.name} {task.id} is in the queue with {place.num_blocks} blocks of {place.num_shards} shards, "
                f"now there would be {cluster.num_blocks} of {cluster.num_shards}: wait for it, or `scancel` it{keep}"
            )
        found[task.name.removeprefix(cluster.prefix), place.block] = task.array
    return found


@dataclass(frozen=True, kw_only=True)
class ShardBlock:
    """Which shards a task has."""

    block: int
    num_blocks: int
    num_shards: int  # that were divided into them


def parse_block(comment: str, index: int | None) -> ShardBlock | None:
    """Of the task with this index, by the comment of its array; None: it has no shards."""
    found = re.fullmatch(r"blocks=(\d+),offset=(\d+),shards=(\d+)", comment)
    if not found or index is None:
        return None
    num_blocks, offset, num_shards = map(int, found.groups())
    return ShardBlock(block=offset + index, num_blocks=num_blocks, num_shards=num_shards)


@contextmanager
def lock_submission(folder: Path) -> Iterator[None]:
    """Only one process submits for a run at a time; the lock ends with the process.

    Raises:
        RefusedError: another one does.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(f"{folder}: another `recap slurm submit` is at work on this run; wait for it") from error
        yield


def find_missing_blocks(cluster: SlurmRun, runner: Runner, found: Iterable[Job]) -> dict[str, Collection[int]]:
    """Title of every job of the run -> blocks in which a table is missing, behind, or stale and to be made again."""
    overview = StateIndex(runner.ledger, runner.plan, runner.passes)
    kinds: tuple[Kind, ...] = (*DUE, "blocked", *(("stale",) if runner.stale == "redo" else ()))
    blocks: dict[str, Collection[int]] = {}
    for job in found:
        shards = {shard for p in job.passes for shard in overview.shards(p, *kinds)}
        blocks[job.title] = {find_block(shard, cluster.num_blocks, cluster.num_shards) for shard in shards}
    return blocks
