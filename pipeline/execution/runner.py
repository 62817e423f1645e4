"""Decides how what is missing gets made: one code path for what a person types and for what an array task executes.

It chooses the shards that are due, overlaps and distributes them, and stops when asked or when nothing helps. How one
shard is made is pipeline/execution/attempt.py's.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipeline import config
from pipeline.errors import (
    BrokenTableError,
    EngineDiedError,
    MachineError,
    RefusedError,
    ShardFailedError,
    StoppedError,
    UserError,
    WorkerDiedError,
)
from pipeline.execution.attempt import Attempt, Stopwatch
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.passes import Pass, Shard
from pipeline.execution.run_state import RunState, Stale
from pipeline.execution.states import DUE, State
from pipeline.execution.workers import VISIBLE, WorkerPool, divide_node, visible_devices
from pipeline.progress import ProgressMeter, ProgressRelay, say
from pipeline.records import Stat
from pipeline.storage import tables
from pipeline.storage.layout import table_path, work_folder
from pipeline.storage.parts import write_failure

OVERLAP = 2  # shards of one engine at a time, so that it does not drain between them
GIVE_UP = 3  # shards failed in a row, none done: what is wrong is not the shard
TICK = 0.5  # seconds after which workers hear of a signal
INSIST = 1.0  # seconds after which a second signal is one more, no echo of the first


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What making one shard of one pass gave."""

    stat: Stat
    overtaken: bool = False  # another process was faster


@dataclass(kw_only=True)
class Outcome:
    """What one command did."""

    done: int = 0  # shard tables made
    skipped: int = 0  # already done
    failures: dict[str, str] = field(default_factory=dict)  # "caption:dense 00007" -> why
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        return 75 if self.stopped else 1 if self.failures else 0


@dataclass
class Runner:
    """Makes what is missing of a run, one pass after the other."""

    state: RunState
    _: KW_ONLY
    limit: int | None = None  # inputs of a shard, for a preview
    workers: int = 1  # processes; those of a pass with an engine have one each, and devices of their own
    retry: frozenset[str] = frozenset()  # statuses whose rows are made again

    def __post_init__(self) -> None:
        self.run = self.state.run
        self._records = {p.folder: p.record for p in self.state.passes}
        self.stop = threading.Event()  # a signal came
        self.given_up = False  # no further shard would fare better
        self.outcome = Outcome()
        self._stopwatch = Stopwatch()
        self._team: WorkerPool | None = None

    def execute(self, chosen: Sequence[Pass]) -> Outcome:
        """Makes all of these passes that is not done yet, one after the other.

        Raises:
            RefusedError: something is stale and `stale` is "stop", or a status to retry does not exist.
        """
        self._check_retry([p for p in chosen if not p.has_payload])
        self.state.check_not_stale(chosen)
        engines = EnginePool(self.run.engines)
        self._team = self._hired(chosen) if self.workers > 1 else None
        try:
            with stop_on_signal(self.stop):
                for p in chosen:
                    if self.stop.is_set() or self.given_up:
                        break
                    engines.close_all_but(p.engines)
                    with closing_after(p):
                        self._make_pass(p, engines)
        except StoppedError:
            self.outcome.stopped = True
        except BaseException:  # a second Ctrl-C too; raised again
            if self._team is not None:
                self._team.kill()
            raise
        finally:
            engines.close_all_but(())
            if self._team is not None:
                self._team.close()
        return self.outcome

    def _hired(self, chosen: Sequence[Pass]) -> WorkerPool:
        """Workers for these passes; they are started once, for they import much."""
        names = {name for p in chosen for name in p.engines}
        on_devices = sorted(name for name in names if getattr(self.run.engines[name].module, "ON_DEVICES", False))
        devices = visible_devices() if on_devices else []
        if 0 < len(devices) < self.workers:
            raise RefusedError(
                f"--workers {self.workers}: each has devices of its own for {', '.join(on_devices)}, "
                f"and {len(devices)} are visible ({VISIBLE}={','.join(devices)})"
            )
        cores = sorted(os.sched_getaffinity(0))
        hire = partial(_Job, self.run.file.parent, self.state.shards, self.state.stale, self.retry)
        return WorkerPool(hire, divide_node(self.workers, cores=cores, devices=devices))

    def _check_retry(self, chosen: Sequence[Pass]) -> None:
        if self.retry and self.state.stale == "keep":
            raise RefusedError(
                "--retry and --stale keep exclude each other; choose one: --retry uses run.toml as it is now"
            )
        if self.retry and not chosen:
            raise RefusedError("--retry: ingest and export make a shard as a whole; remove its table to make it again")
        known = {status for p in chosen for status in get_args(get_type_hints(p.record).get("status"))} - {"ok"}
        if unknown := self.retry - known:
            raise RefusedError(f"--retry {','.join(sorted(unknown))}: the statuses here are {', '.join(sorted(known))}")

    def _make_pass(self, p: Pass, engines: EnginePool) -> None:
        self.state.check_not_stale([p])  # what was just made may be what this pass was made from
        states = {shard: self.state.states.state(p, shard) for shard in self.state.selected}
        todo = [shard for shard, state in states.items() if self._is_due(p, state)]
        blocked = [shard for shard, state in states.items() if state.kind == "blocked"]
        self.outcome.skipped += len(states) - len(todo) - len(blocked)
        broken = [shard for shard in todo if states[shard].kind in ("missing", "incomplete") and states[shard].why]
        for path in (table_path(self.run.folder, p.folder, shard) for shard in broken):
            if tables.read_whole_footer(path) is None:  # another process may have made it meanwhile
                self._set_aside(path)
        if broken:
            others = f" (and {len(broken) - 1} more like it)" if broken[1:] else ""
            say(f"recap: {states[broken[0]].why}{others}; it is made again")
        lacks = {n: f"{states[n].why}; run the stage that makes it first" for n in blocked}
        made = [q.title for q in self.state.passes if q.folder in p.reads]
        news = [n for n in blocked if not any(f"{title} {n:05d}" in self.outcome.failures for title in made)]
        if news:
            others = f" (and {len(news) - 1} shards more like it)" if news[1:] else ""
            say(f"recap: {p.title} {news[0]:05d} failed: {lacks[news[0]]}{others}")
        self.outcome.failures |= {f"{p.title} {n:05d}": why for n, why in lacks.items()}
        if todo:
            with ProgressMeter(p.title, num_shards=len(todo), num_rows=self.state.count_rows(p, todo)) as meter:
                self._make_shards(p, todo, engines, meter)
        if p.finish and not self.outcome.failures and self.state.is_complete(p):
            p.finish(self.run, bool(todo))

    def _is_due(self, p: Pass, state: State) -> bool:
        if state.kind in DUE:
            return True
        if state.kind == "stale":
            return self.state.stale == "redo"
        asked = state.footer is not None and any(state.footer.statuses.get(status) for status in self.retry)
        return state.kind == "done" and asked and not p.has_payload

    def _make_shards(self, p: Pass, shards: Sequence[int], engines: EnginePool, meter: ProgressMeter) -> None:
        failed_in_a_row = num_made = 0
        for shard, result in self._results(p, shards, engines, meter):
            self.state.states.forget(shard)
            if isinstance(result, ShardResult):
                failed_in_a_row, num_made = 0, num_made + 1
                self.outcome.done += not result.overtaken
                self.outcome.skipped += result.overtaken
                meter.shard_done()
                continue
            if isinstance(result, UserError):  # of an engine that cannot be opened as run.toml says
                self.given_up = True
                raise result
            if isinstance(result, StoppedError) or (
                isinstance(result, EngineDiedError | WorkerDiedError) and self.stop.is_set()
            ):
                self.outcome.stopped = True  # a terminal's Ctrl-C reaches an engine's own processes too
                continue
            self._fail(p, shard, result)
            failed_in_a_row += 1
            self.given_up |= isinstance(result, EngineDiedError) or (failed_in_a_row >= GIVE_UP and not num_made)
        if self.outcome.stopped or (self.stop.is_set() and meter.shards < len(shards)):
            raise StoppedError

    def _results(
        self, p: Pass, shards: Sequence[int], engines: EnginePool, meter: ProgressMeter
    ) -> Iterator[tuple[int, ShardResult | BaseException]]:
        """Makes shards, a few at a time; what went wrong is a result."""
        at_once = OVERLAP if p.engines else 1
        team = self._team if len(shards) > 1 else None
        limit = at_once * self.workers if team else at_once
        waiting, running = deque(shards), dict[Future[ShardResult], int]()
        with ThreadPoolExecutor(at_once) as here:
            while waiting or running:
                while waiting and len(running) < limit and not self.stop.is_set() and not self.given_up:
                    shard = waiting.popleft()
                    if team:
                        made = team.submit((p.folder, shard), hear=lambda news: meter.add(*news))
                    else:
                        made = here.submit(self.make, p, shard, engines, meter)
                    running[made] = shard
                if not running:
                    return
                for future in self._ended(running, team):
                    yield running.pop(future), future.exception() or future.result()

    def _ended(self, running: Iterable[Future[ShardResult]], team: WorkerPool | None) -> Iterable[Future[ShardResult]]:
        """Those that have ended when some have; workers are told meanwhile when a signal came."""
        while not (ended := wait(running, timeout=TICK, return_when=FIRST_COMPLETED).done):
            if team and self.stop.is_set():
                team.stop()
        for future in ended:
            error = future.exception()
            if isinstance(error, WorkerDiedError) and not self.stop.is_set():
                raise error
        return ended

    def make(self, p: Pass, number: int, engines: EnginePool, meter: ProgressMeter) -> ShardResult:
        """Makes one shard of one pass; raises what `Attempt.make` raises."""
        attempt = Attempt(
            p=p,
            shard=Shard(run=self.run, number=number, pieces=self.state.plan.pieces(number), limit=self.limit),
            provenance=self.state.states.provenance(p, number),
            records=self._records,
            retry=self.retry,
            stop=self.stop,
            meter=meter,
        )
        begun = self._stopwatch.begin()
        try:
            overtaken = not attempt.make(engines)
        finally:
            seconds = self._stopwatch.end(begun)
        stat = attempt.tally.stat(number, seconds=seconds, waiting=engines.waiting(p.engines))
        if not overtaken:
            self._record(p, stat)
        return ShardResult(stat=stat, overtaken=overtaken)

    def _record(self, p: Pass, stat: Stat) -> None:
        path = table_path(self.run.folder / "stats", p.folder, stat.shard)
        recipe = tables.Provenance(stage="stats", name="", version=1, slice={}, inputs={})
        tables.write_rows(path, Stat, [stat], recipe)

    def _fail(self, p: Pass, shard: int, why: BaseException) -> None:
        place = f"{p.title} {shard:05d}"
        message = str(why) or type(why).__name__
        if not isinstance(why, ShardFailedError | EngineDiedError | OSError | MachineError):
            message = "".join(traceback.format_exception(why)).rstrip()
        if isinstance(why, BrokenTableError):
            message += self._set_aside(why.path)
        self.outcome.failures[place] = message
        say(f"recap: {place} failed: {message}")
        with suppress(OSError):
            write_failure(work_folder(self.run.folder, p.folder, shard), message)

    def _set_aside(self, path: Path) -> str:
        """Takes a table that does not read out of the way, and out of the views; the next run makes it again."""
        aside = path.with_name(f"{path.name}.broken")
        with suppress(FileNotFoundError):
            os.replace(path, aside)
        return f"; it lies in {aside.name} now, and the same command again makes a new one"


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """The first signal asks to stop, the second insists."""
    first = math.inf

    def on_signal(number: int, _: object) -> None:
        nonlocal first
        if stop.is_set():
            if time.monotonic() - first > INSIST:
                raise KeyboardInterrupt
            return  # Slurm signals a whole job, and a job's script passes on what it gets: one wish, heard twice
        first = time.monotonic()
        stop.set()
        say(f"recap: {signal.Signals(number).name}: finishing what is in flight (again: stop at once)")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def closing_after(p: Pass) -> Iterator[None]:
    try:
        yield
    finally:
        if p.close:
            p.close()


class _Job:
    """What a worker process does: it makes shards, with engines of its own that it keeps for the whole pass."""

    def __init__(self, folder: Path, shards: str, stale: Stale, retry: frozenset[str]) -> None:
        state = RunState(config.load(folder), shards=shards, stale=stale)
        self._runner = Runner(state, retry=retry)
        self._engines = EnginePool(self._runner.run.engines)
        self._passes = {p.folder: p for p in self._runner.state.passes}
        self._pass: Pass | None = None
        self._turning = threading.Lock()

    def do(self, task: tuple[str, int], tell: Callable[[Any], None]) -> ShardResult:
        folder, shard = task
        self._turn_to(self._passes[folder])
        self._runner.state.states.forget(shard)
        relay = ProgressRelay(tell)
        try:
            return self._runner.make(self._passes[folder], shard, self._engines, relay)
        finally:
            relay.flush()

    def stop(self) -> None:
        self._runner.stop.set()

    def close(self) -> None:
        self._turn_to(None)

    def _turn_to(self, p: Pass | None) -> None:
        """When the pass changes, nothing of the one before is running."""
        with self._turning:
            if self._pass is p:
                return
            if self._pass is not None and self._pass.close is not None:
                self._pass.close()
            self._engines.close_all_but(p.engines if p is not None else ())
            self._pass = p
