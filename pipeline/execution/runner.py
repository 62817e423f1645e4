"""Makes what is missing of a run: one code path for the command line and for Slurm array tasks.

The runner chooses the shards that are due, spreads them over threads and worker processes, and stops when asked to or
when no further shard would succeed. pipeline/execution/attempt.py makes a single shard.
"""

from __future__ import annotations

import os
import shlex
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipeline import config, machine
from pipeline.errors import (
    BrokenTableError,
    EngineDiedError,
    RefusedError,
    StoppedError,
    UserError,
    WorkerDiedError,
)
from pipeline.execution.budget import Budget
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.passes import Pass
from pipeline.execution.run_state import RunState, Stale
from pipeline.execution.shard_maker import ShardMaker, ShardResult
from pipeline.execution.signals import stop_on_signal
from pipeline.execution.states import DUE, State
from pipeline.execution.workers import VISIBLE, WorkerPool, divide_node, visible_devices
from pipeline.progress import ProgressMeter, ProgressRelay, format_quantity, say
from pipeline.storage import tables
from pipeline.storage.layout import sweep_unfinished, table_path, work_folder
from pipeline.storage.parts import write_failure

OVERLAP = 2  # shards at a time, so that neither an engine nor a disk drains between them
MAX_FAILED = 3  # shards in a row, with none made, after which the rest would fail too
POLL = 0.5  # seconds between checks whether workers must be stopped


@dataclass(kw_only=True)
class Outcome:
    """Counts of the work of one command."""

    done: int = 0  # shard tables made
    skipped: int = 0  # shard tables that were done before
    failures: dict[str, str] = field(default_factory=dict)  # "caption:dense 00007" -> why
    stopped: bool = False
    limit: str = ""  # the limit of run.toml that stopped it

    @property
    def exit_code(self) -> int:
        return 3 if self.stopped and self.limit else 75 if self.stopped else 1 if self.failures else 0


@dataclass
class Runner:
    """Makes what is missing of a run, one pass after the other."""

    state: RunState
    _: KW_ONLY
    limit: int | None = None  # inputs of a shard, for a preview
    workers: int = 1  # processes; each has engines and devices of its own
    retry: frozenset[str] = frozenset()  # statuses whose rows are made again

    def __post_init__(self) -> None:
        self.outcome = Outcome()
        self._stop = threading.Event()  # a signal came, or a limit is reached
        self._given_up = False  # no further shard would succeed
        self._maker = ShardMaker(self.state.states, stop=self._stop, retry=self.retry, limit=self.limit)
        self._pool: WorkerPool | None = None

    def execute(self, passes: Sequence[Pass]) -> Outcome:
        """Makes what is not done yet of these passes, in order.

        Raises:
            RefusedError: a table is stale and `stale` is "stop", or a status to retry does not exist.
        """
        sweep_unfinished(self.state.run.folder)  # of killed commands, beside the plan and run.toml
        self._check_retry(passes)
        self.state.check_not_stale(passes)
        self._budget = Budget(self.state.run, num_procs=self.workers)
        engines = EnginePool(self.state.run.engines, stop=self._stop)
        self._pool = self._create_pool(passes) if self.workers > 1 else None
        try:
            with stop_on_signal(self._stop):
                for p in passes:
                    if self._stop.is_set():
                        raise StoppedError
                    if self._given_up:
                        break
                    engines.close_all_but(p.engines)
                    try:
                        self._make_pass(p, engines)
                    finally:
                        if p.close:
                            p.close()
        except StoppedError:
            self.outcome.stopped = True
        except BaseException:  # a second Ctrl-C too: workers must not outlive the command; re-raised
            if self._pool is not None:
                self._pool.kill()
            raise
        finally:
            engines.close_all_but(())
            if self._pool is not None:
                self._pool.shutdown()
        return self.outcome

    def _check_retry(self, passes: Sequence[Pass]) -> None:
        if self.retry and self.state.stale == "keep":
            raise RefusedError(
                "--retry and --stale keep exclude each other; choose one: --retry uses run.toml as it is now"
            )
        known = {status for p in passes for status in get_args(get_type_hints(p.record).get("status"))} - {"ok"}
        if unknown := self.retry - known:
            choices = f"the statuses here are {', '.join(sorted(known))}" if known else "no row here has a status"
            raise RefusedError(f"--retry {','.join(sorted(unknown))}: {choices}")

    def _create_pool(self, passes: Sequence[Pass]) -> WorkerPool:
        """One pool for all passes: workers take long to start, because they import much."""
        run = self.state.run
        names = {name for p in passes for name in p.engines}
        on_devices = sorted(name for name in names if getattr(run.engines[name].module, "ON_DEVICES", False))
        devices = visible_devices() if on_devices else []
        if 0 < len(devices) < self.workers:
            raise RefusedError(
                f"--workers {self.workers}: each needs devices of its own for {', '.join(on_devices)}, "
                f"and {len(devices)} are visible ({VISIBLE}={','.join(devices)})"
            )
        cores = sorted(os.sched_getaffinity(0))
        make_job = partial(WorkerJob, run.file.parent, self.state.shards, self.state.stale, self.retry)
        return WorkerPool(make_job, divide_node(self.workers, cores=cores, devices=devices))

    def _make_pass(self, p: Pass, engines: EnginePool) -> None:
        if p.folder in self.state.finished and not self.retry:
            self.outcome.skipped += self.state.plan.num_shards
            self._finish(p, is_new=False)
            return
        self.state.states.forget_whole()
        self.state.check_not_stale([p])  # an input that was made just now may have made it stale
        states = {shard: self.state.states.state(p, shard) for shard in self.state.selected}
        due = {shard: state for shard, state in states.items() if self._is_due(state)}
        blocked = {shard: state for shard, state in states.items() if state.kind == "blocked"}
        self.outcome.skipped += len(states) - len(due) - len(blocked)
        self._set_aside_damaged(p, due)
        self._fail_blocked(p, blocked)
        if due:
            num_rows = self.state.count_rows(p, list(due))
            meter = ProgressMeter(p.title, num_shards=len(due), num_rows=num_rows, on_tokens=self._spend)
            self._spend(0)
            with meter:
                self._make_shards(p, list(due), engines, meter)
        self._finish(p, is_new=bool(due))

    def _finish(self, p: Pass, *, is_new: bool) -> None:
        if p.finish and not self.outcome.failures and self.state.is_complete(p):
            p.finish(self.state.run, is_new)

    def _spend(self, tokens: int) -> None:
        """Counts tokens, and stops as on a signal when a limit of run.toml is reached."""
        self._budget.spend(tokens)
        if not self.outcome.limit and not self._stop.is_set() and (excess := self._budget.describe_excess()):
            self.outcome.limit = excess
            self._stop.set()
            say(f"recap: {excess}")

    def _is_due(self, state: State) -> bool:
        if state.kind in DUE:
            return True
        if state.kind == "stale":
            return self.state.stale == "redo"
        retried = state.footer is not None and any(state.footer.statuses.get(status) for status in self.retry)
        return state.kind == "done" and retried

    def _set_aside_damaged(self, p: Pass, due: Mapping[int, State]) -> None:
        """Renames damaged table files, and says that they are made again."""
        damaged = [n for n, state in due.items() if state.kind in ("missing", "incomplete") and state.why]
        for path in (table_path(self.state.run.folder, p.folder, n) for n in damaged):
            if tables.read_whole_footer(path) is None:  # otherwise another process has made it meanwhile
                _set_aside(path)
        if damaged:
            others = f" (and {len(damaged) - 1} more like it)" if damaged[1:] else ""
            say(f"recap: {due[damaged[0]].why}{others}; it is made again")

    def _fail_blocked(self, p: Pass, blocked: Mapping[int, State]) -> None:
        """Records shards whose input is missing as failed; silent where making that input has just failed."""
        reasons = {n: f"{state.why}; {self._advise(state)}" for n, state in blocked.items()}
        inputs = [q.title for q in self.state.passes if q.folder in p.depends_on]
        new = [n for n in blocked if not any(f"{title} {n:05d}" in self.outcome.failures for title in inputs)]
        if new:
            others = f" (and {format_quantity(len(new) - 1, 'shard')} more like it)" if new[1:] else ""
            say(f"recap: {p.title} {new[0]:05d} failed: {reasons[new[0]]}{others}")
        self.outcome.failures |= {f"{p.title} {n:05d}": why for n, why in reasons.items()}

    def _advise(self, blocked: State) -> str:
        """The command that makes the missing input of a blocked shard."""
        first = next((q.title for q in self.state.passes if blocked.why.startswith(f"{q.folder}/")), "all")
        return f"`recap run {first} --run {shlex.quote(str(self.state.run.folder))}` makes it"

    def _make_shards(self, p: Pass, shards: Sequence[int], engines: EnginePool, meter: ProgressMeter) -> None:
        num_failed_in_row = num_made = 0
        for shard, result in self._dispatch(p, shards, engines, meter):
            self.state.forget(shard)
            if isinstance(result, ShardResult):
                num_failed_in_row, num_made = 0, num_made + 1
                self.outcome.done += not result.overtaken
                self.outcome.skipped += result.overtaken
                meter.shard_done()
            elif isinstance(result, UserError):  # an engine cannot be opened with these settings
                self._given_up = True
                raise result
            elif isinstance(result, StoppedError) or (
                self._stop.is_set() and isinstance(result, EngineDiedError | WorkerDiedError)
            ):
                self.outcome.stopped = True  # Ctrl-C in a terminal reaches the processes of engines and workers too
            else:
                self._record_failure(p, shard, result)
                num_failed_in_row += 1
                hopeless = num_failed_in_row >= MAX_FAILED and not num_made
                self._given_up |= hopeless or isinstance(result, EngineDiedError)
        if self.outcome.stopped or (self._stop.is_set() and meter.shards < len(shards)):
            raise StoppedError

    def _dispatch(
        self, p: Pass, shards: Sequence[int], engines: EnginePool, meter: ProgressMeter
    ) -> Iterator[tuple[int, ShardResult | BaseException]]:
        """Makes shards, a few at a time, and yields results and exceptions as they come."""
        num_threads = OVERLAP if p.engines or p.overlaps else 1
        pool = self._pool if len(shards) > 1 else None
        limit = num_threads * self.workers if pool else num_threads
        waiting, running = deque(shards), dict[Future[ShardResult], int]()
        with ThreadPoolExecutor(num_threads) as threads, _closing_if_interrupted(engines):
            while waiting or running:
                while waiting and len(running) < limit and not self._stop.is_set() and not self._given_up:
                    shard = waiting.popleft()
                    if pool:
                        future = pool.submit((p.folder, shard), on_progress=lambda counts: meter.add(*counts))
                    else:
                        future = threads.submit(self._maker.make, p, shard, engines, meter)
                    running[future] = shard
                if not running:
                    return
                for future in self._wait(running, pool, engines=engines, meter=meter):
                    yield running.pop(future), future.exception() or future.result()

    def _wait(
        self,
        running: Iterable[Future[ShardResult]],
        pool: WorkerPool | None,
        *,
        engines: EnginePool,
        meter: ProgressMeter,
    ) -> Iterable[Future[ShardResult]]:
        """Waits until a shard has ended; passes a signal on to the workers and reports a stall meanwhile."""
        while not (ended := wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done):
            self._spend(0)
            if not engines.is_loading:
                meter.report_stall()
            if pool and self._stop.is_set():
                pool.stop()
        for future in ended:
            error = future.exception()
            if isinstance(error, WorkerDiedError) and not self._stop.is_set():
                raise error
        return ended

    def _record_failure(self, p: Pass, shard: int, error: BaseException) -> None:
        title = f"{p.title} {shard:05d}"
        trouble = machine.find_trouble(error)
        message = str(trouble or error) or type(error).__name__
        if trouble is None and not isinstance(error, OSError):
            message = "".join(traceback.format_exception(error)).rstrip()
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if missing and not str(missing).startswith(str(self.state.run.folder)):
            message += "; put it back, or let `recap plan` say how to go on without it"
        if isinstance(error, BrokenTableError):
            message += f"; it is now {_set_aside(error.path)}, and the same command makes it again"
        self.outcome.failures[title] = message
        say(f"recap: {title} failed: {message}")
        with suppress(OSError):
            write_failure(work_folder(self.state.run.folder, p.folder, shard), message)


@contextmanager
def _closing_if_interrupted(engines: EnginePool) -> Iterator[None]:
    """Closes the engines on a second Ctrl-C, so that threads which wait for them save their rows and end."""
    try:
        yield
    except KeyboardInterrupt:
        engines.close_all_but(())
        raise


def _set_aside(path: Path) -> str:
    """Renames a damaged table, so that no view reads it and the next run makes it again; returns its new name."""
    aside = path.with_name(f"{path.name}.broken")
    with suppress(FileNotFoundError):
        os.replace(path, aside)
    return aside.name


class WorkerJob:
    """The loop of a worker process: makes shards with engines of its own, which stay open for the whole pass."""

    def __init__(self, folder: Path, shards: str, stale: Stale, retry: frozenset[str]) -> None:
        self._state = RunState(config.load(folder), shards=shards, stale=stale)
        self._stop = threading.Event()
        self._maker = ShardMaker(self._state.states, stop=self._stop, retry=retry)
        self._engines = EnginePool(self._state.run.engines, stop=self._stop)
        self._passes = {p.folder: p for p in self._state.passes}
        self._current: Pass | None = None
        self._lock = threading.Lock()

    def do(self, task: tuple[str, int], send: Callable[[Any], None]) -> ShardResult:
        folder, shard = task
        self._switch_to(self._passes[folder])
        self._state.states.forget(shard)
        relay = ProgressRelay(send)
        try:
            return self._maker.make(self._passes[folder], shard, self._engines, relay)
        finally:
            relay.flush()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._switch_to(None)

    def _switch_to(self, p: Pass | None) -> None:
        """Closes what only the previous pass needs; none of its tasks is running when the pass changes."""
        with self._lock:
            if self._current is p:
                return
            if self._current is not None and self._current.close is not None:
                self._current.close()
            self._state.states.forget_whole()
            self._engines.close_all_but(p.engines if p is not None else ())
            self._current = p
