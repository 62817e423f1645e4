"""The jobs of a run: their blocks of shards, their dependencies, and their submission.

It keeps no queue of its own: Slurm knows what is queued, the tables show what is done.
"""

from __future__ import annotations

import fcntl
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipeline import plugins
from pipeline.engines import openai
from pipeline.engines._options import require_api_key
from pipeline.errors import ConfigError, RefusedError, SlurmError, UserError
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState, Stale
from pipeline.execution.state_index import StateIndex
from pipeline.execution.states import DUE, Kind
from pipeline.progress import format_quantity, say
from pipeline.sections import Plugin, Run, endpoint_file
from pipeline.slurm import scheduler
from pipeline.slurm.blocks import Job, find_block, parse_block, plan_jobs
from pipeline.slurm.script import JobArray, SlurmRun
from pipeline.storage.plan import format_spec


@dataclass(kw_only=True)
class Submission:
    """The jobs of one submission with their dependencies."""

    slurm_run: SlurmRun
    jobs: Sequence[Job]  # of the whole run
    window: int  # maximum number of tasks in an array
    due: Mapping[str, Collection[int]]  # title of any job of the run -> its blocks that lack a table
    queued: Mapping[tuple[str, int], str]  # title, block -> the array in Slurm's queue that makes it
    servers: Mapping[str, str]  # engine -> the job in the queue that serves it
    submit: Callable[[str, str, str], str]  # title, script, dependency -> the job's id

    def submit_missing(self, chosen: Sequence[Job]) -> int:
        """Submits all blocks that are due and not queued; returns the number of tasks."""
        self._arrays, self._servers = dict(self.queued), dict(self.servers)
        for job in chosen:
            before = len(self._arrays)
            self._submit_arrays(job)
            writes_whole = any(p.finish for p in job.passes) and self.slurm_run.num_blocks > 1
            if writes_whole and len(self._arrays) > before:
                dependency = f"afterok:{':'.join(self._array_ids([job]))}"
                self.submit(f"{job.title}-whole", self.slurm_run.render_whole(job), dependency)
        num_tasks = len(self._arrays) - len(self.queued)
        for engine in sorted(self.slurm_run.served):
            users = self._array_ids(job for job in self.jobs if engine in job.engines)
            if users and (num_tasks or engine not in self.servers):
                script = self.slurm_run.render_release(engine, self._start_server(engine))
                self.submit(f"release-{engine}", script, f"afterany:{':'.join(users)}")
        return num_tasks

    def _submit_arrays(self, job: Job) -> None:
        previous = max(self._array_ids([job]), key=int, default="") if self.queued else ""
        whole, is_prepared = self._array_ids(other for other in self.jobs if other.title in job.reads_all), False
        for (number, producers), blocks in self._order_groups(job):
            conditions = [f"aftercorr:{':'.join(producers)}"] if producers else []
            conditions += [f"afterok:{':'.join(whole)}"] if whole else []
            conditions += [f"after:{self._start_server(name)}" for name in sorted(job.engines & self.slurm_run.served)]
            if previous and self.slurm_run.resources(job).max_running:
                conditions.append(f"afterany:{previous}")
            array = JobArray(job=job, offset=number * self.window, blocks=tuple(blocks))
            title = job.title + (f".{number}" if number else "")
            previous = self.submit(title, self.slurm_run.render_array(array), ",".join(conditions))
            self._arrays.update({(job.title, block): previous for block in blocks})
            if job.reads_all and not is_prepared:
                whole, is_prepared = [previous], True  # which has read all shards for the others

    def _order_groups(self, job: Job) -> list[tuple[tuple[int, tuple[str, ...]], list[int]]]:
        """The blocks to make, in groups; of a job that reads all shards, the first block is a group of its own."""
        groups = sorted(self._group_blocks(job).items())
        if job.reads_all and groups and groups[0][1][1:]:
            where, (first, *others) = groups[0]
            return [(where, [first]), (where, others), *groups[1:]]
        return groups

    def _group_blocks(self, job: Job) -> dict[tuple[int, tuple[str, ...]], list[int]]:
        """Blocks to make, by window and by the arrays that make their inputs. Blocks without inputs are left out."""
        groups = defaultdict(list)
        blocked: dict[str, list[int]] = defaultdict(list)
        incomplete = [
            title
            for title in sorted(job.reads_all)
            if any((title, block) not in self._arrays for block in self.due[title])
        ]
        for block in sorted(self.due[job.title]):
            if (job.title, block) in self._arrays:
                continue
            arrays = {title: self._arrays.get((title, block)) for title in sorted(job.reads - job.reads_all)}
            lacking = [title for title, array in arrays.items() if array is None and block in self.due[title]]
            lacking += incomplete
            for title in lacking:
                blocked[title].append(block)
            if not lacking:
                producers = sorted({array for array in arrays.values() if array is not None})
                groups[block // self.window, tuple(producers)].append(block)
        for title, blocks in blocked.items():
            say(f"{job.title}: blocks {format_spec(blocks)} skipped: they need {title}, neither done nor queued")
        return groups

    def _start_server(self, engine: str) -> str:
        """The job that serves an engine; submitted when there is none."""
        if engine not in self._servers:
            self._servers[engine] = self.submit(f"serve-{engine}", self.slurm_run.render_server(engine), "")
        return self._servers[engine]

    def _array_ids(self, jobs: Iterable[Job]) -> list[str]:
        titles = {job.title for job in jobs}
        return sorted({array for (title, _), array in self._arrays.items() if title in titles})


def select_jobs(run: Run, names: Sequence[str], *, stale: Stale) -> tuple[RunState, list[Job]]:
    """The run and the jobs that `names` select, each STAGE, STAGE:NAME or `all`.

    Raises:
        UserError: run.toml is invalid, a name is unknown, or a table is stale and `stale` is "stop".
        RefusedError: the run's path has characters that a line #SBATCH cannot hold.
    """
    path = str(run.folder.resolve())
    if not path.isprintable() or set(path) & set('"\\'):
        raise RefusedError(
            f"{path!r}: job scripts cannot name this directory; rename it without quotes, \\ and controls"
        )
    for name in run.slurm.settings.serve:
        check_served(run, name)
    state = RunState(run, stale=stale)
    chosen = {p.folder for name in names for p in select_passes(state.passes, name)}
    index = StateIndex(state.states)  # without it, every footer would be read
    state.check_not_stale([p for p in state.passes if p.folder in chosen and index.shards(p, "stale")])
    jobs = [job for job in plan_jobs(state.passes) if {p.folder for p in job.passes} & chosen]
    for job in jobs:
        check_gpus(SlurmRun(run=run, num_shards=state.plan.num_shards), job)
    return state, jobs


def check_served(run: Run, name: str) -> None:
    """Finds, before a job waits an hour, a server that cannot start or that no engine would use.

    Raises:
        ConfigError: there is no such engine, it does not use its endpoint file, or its server would need no API key.
    """
    if name not in run.engines:
        raise ConfigError(f"{run.file}: slurm.serve", plugins.explain_unknown(name, sorted(run.engines)))
    engine, where = run.engines[name].config, f"{run.file}: engines.{name}"
    if not isinstance(engine, openai.Config) or engine.base_url != str(endpoint_file(run.file.parent, name)):
        raise ConfigError(
            where, 'is listed in slurm.serve; set kind = "openai" and base_url = "endpoint" to use its server'
        )
    require_api_key(run.slurm.settings.serve_host, has_key=bool(engine.api_key_env), where=where)


def check_gpus(slurm_run: SlurmRun, job: Job) -> None:
    """Finds, before a cluster allocates them, GPUs that no process would use, or too few of them.

    Raises:
        ConfigError: the workers of a task cannot use as many GPUs as it requests, or would have too few.
    """
    resources, field = slurm_run.resources(job), f"{slurm_run.run.file}: slurm.{job.stage}"
    sizes = {name: count_gpus(slurm_run.run.engines[name]) for name in slurm_run.gpu_engines(job)}
    if not sizes:
        return
    users = ", ".join(f"engines.{name}" for name in sorted(sizes))
    least = max(num or 0 for num in sizes.values())  # 0: no section says it; the engine may compute on the CPU
    if 0 < resources.gpus < (need := resources.workers * least):
        fewer = f", or workers = {resources.gpus // least}" if resources.gpus >= least else ""
        raise ConfigError(
            f"{field}.gpus",
            f"{resources.gpus} are too few: workers = {resources.workers}, and each needs {least} for {users}; "
            f"set gpus = {need}{fewer}, or gpus = 0 to compute on the CPU",
        )
    size = max(num or resources.gpus for num in sizes.values())
    if resources.gpus > (most := resources.workers * size):
        more = f", or workers = {resources.gpus // size}" if resources.gpus // size > resources.workers else ""
        raise ConfigError(
            f"{field}.gpus",
            f"of {resources.gpus} no more than {most} would be used: workers = {resources.workers}, and each has "
            f"{size} for {users}; set gpus = {most}{more}",
        )
    shards = -(-slurm_run.num_shards // slurm_run.num_blocks)
    if resources.workers > shards:
        say(
            f"recap: {field}.workers: a task has {format_quantity(shards, 'shard')} for {resources.workers} workers; "
            f"set slurm.num_tasks = {max(1, slurm_run.num_shards // resources.workers)} or less to use all workers"
        )


def count_gpus(engine: Plugin) -> int | None:
    """GPUs of one process of an engine; None where its section does not say."""
    if engine.kind == "transformers":
        return 1
    if not hasattr(engine.config, "tensor_parallel_size"):
        return None
    sizes = {"tensor_parallel_size": engine.config.tensor_parallel_size, **getattr(engine.config, "extra", {})}
    return prod(int(sizes.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline", "data"))


def render_scripts(state: RunState, chosen: Sequence[Job]) -> Iterator[str]:
    """The scripts that `submit_jobs` would submit to an empty queue, for people to read and to change.

    Where there are several, each begins with a comment instead of its #! line, so that sbatch refuses them as one file
    rather than running only the first.
    """
    scripts: list[tuple[str, str]] = []

    def collect(title: str, text: str, dependency: str) -> str:
        shebang, rest = text.split("\n", 1)
        note = f"# submit with: sbatch --dependency='{dependency}'\n" if dependency else ""
        scripts.append((title, f"{shebang}\n{note}{rest}"))
        return f"<{title}>"

    slurm_run = SlurmRun(run=state.run, num_shards=state.plan.num_shards, stale=state.stale)
    jobs = plan_jobs(state.passes)
    try:
        window = scheduler.read_max_array_size()
    except (SlurmError, UserError):  # scripts can be shown on a machine without Slurm
        window = scheduler.MAX_ARRAY_SIZE
    titles = {job.title for job in chosen}
    missing = find_missing_blocks(slurm_run, state, jobs)
    due = {title: blocks if title in titles else [] for title, blocks in missing.items()}
    Submission(
        slurm_run=slurm_run, jobs=jobs, window=window, due=due, queued={}, servers={}, submit=collect
    ).submit_missing(chosen)
    for number, (title, text) in enumerate(scripts, 1):
        yield (f"# {title}: script {number} of {len(scripts)}, a file of its own\n" if scripts[1:] else "") + text


def submit_jobs(state: RunState, chosen: Sequence[Job]) -> int:
    """Submits what is missing and not queued; returns the number of tasks.

    Raises:
        RefusedError: jobs of this run with other blocks are queued, or another process is submitting.
        SlurmError: Slurm refused a job; the jobs before it are queued, and another `submit` continues from there.
    """
    slurm_run = SlurmRun(run=state.run, num_shards=state.plan.num_shards, stale=state.stale)
    jobs, submitted = plan_jobs(state.passes), list[str]()
    serving = f"{slurm_run.prefix}serve-"

    def submit(title: str, text: str, dependency: str) -> str:
        if title.startswith("serve-"):  # the file of a server that has ended
            slurm_run.endpoint(title.removeprefix("serve-")).unlink(missing_ok=True)
        job = scheduler.submit_script(text, [f"--dependency={dependency}"] if dependency else [])
        submitted.append(slurm_run.prefix + title)
        slurm_run.save_script(title, job, text, dependency)
        say(f"{job}: {title}" + (f", after {dependency}" if dependency else ""))
        return job

    with lock_submission(slurm_run.folder):
        tasks = scheduler.list_tasks(slurm_run.job_names(jobs))
        submission = Submission(
            slurm_run=slurm_run,
            jobs=jobs,
            window=scheduler.read_max_array_size(),
            due=find_missing_blocks(slurm_run, state, jobs),
            queued=find_queued_blocks(slurm_run, tasks),
            servers={t.name.removeprefix(serving): t.array for t in tasks if t.name.startswith(serving)},
            submit=submit,
        )
        num_tasks = submission.submit_missing(chosen)
        replaced = [t.array for t in tasks if t.index is None and t.name in submitted]  # their successors wait for more
        scheduler.cancel_jobs(replaced)
    return num_tasks


def find_queued_blocks(slurm_run: SlurmRun, tasks: Iterable[scheduler.QueuedTask]) -> dict[tuple[str, int], str]:
    """Title and block of every queued or running task -> its array.

    Raises:
        RefusedError: its blocks are not those that would be submitted now.
    """
    queued = {}
    for task in tasks:
        if (block := parse_block(task.comment, task.index)) is None:
            continue
        if (block.num_blocks, block.num_shards) != (slurm_run.num_blocks, slurm_run.num_shards):
            same_plan = block.num_shards == slurm_run.num_shards
            keep = f", or set slurm.num_tasks = {block.num_blocks}" if same_plan else ""
            raise RefusedError(
                f"{task.name} {task.id} is in the queue with {block.num_blocks} blocks of {block.num_shards} shards, "
                f"now there would be {slurm_run.num_blocks} of {slurm_run.num_shards}: wait for it or "
                f"`scancel` it{keep}"
            )
        queued[task.name.removeprefix(slurm_run.prefix), block.number] = task.array
    return queued


@contextmanager
def lock_submission(folder: Path) -> Iterator[None]:
    """Lets one process at a time submit for a run; the lock ends with the process.

    Raises:
        RefusedError: another process holds the lock.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not create it
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(f"{folder}: another `recap slurm submit` is at work on this run; wait for it") from error
        yield


def find_missing_blocks(slurm_run: SlurmRun, state: RunState, jobs: Iterable[Job]) -> dict[str, Collection[int]]:
    """Title of every job of the run -> blocks in which a table is missing, behind, or stale and to be remade."""
    index = StateIndex(state.states)
    kinds: tuple[Kind, ...] = (*DUE, "blocked", *(("stale",) if state.stale == "redo" else ()))
    blocks: dict[str, Collection[int]] = {}
    for job in jobs:
        shards = {shard for p in job.passes for shard in index.shards(p, *kinds)}
        blocks[job.title] = {find_block(shard, slurm_run.num_blocks, slurm_run.num_shards) for shard in shards}
    return blocks
