"""Making single shards of a run, in this process or in a worker process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.execution.attempt import Attempt
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.passes import Pass, Shard
from pipeline.execution.run_state import RunState, Stale
from pipeline.execution.tally import SharedStopwatch
from pipeline.progress import ProgressMeter, ProgressRelay
from pipeline.records import Stat
from pipeline.storage import tables
from pipeline.storage.layout import table_path


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """The result of an attempt at one shard of one pass."""

    stat: Stat
    overtaken: bool = False  # another process made the table first


@dataclass
class ShardMaker:
    """Makes shards, several at a time in threads."""

    state: RunState
    _: KW_ONLY
    stop: threading.Event
    retry: frozenset[str]  # statuses whose rows are made again
    limit: int | None = None  # inputs of a shard

    def __post_init__(self) -> None:
        self._records = {p.folder: p.record for p in self.state.passes}
        self._stopwatch = SharedStopwatch()

    def make(self, p: Pass, number: int, engines: EnginePool, meter: ProgressMeter) -> ShardResult:
        """Makes one shard of one pass and records its statistics; raises what `Attempt.make` raises."""
        run = self.state.run
        attempt = Attempt(
            p=p,
            shard=Shard(run=run, number=number, pieces=self.state.plan.pieces(number), limit=self.limit),
            provenance=self.state.states.provenance(p, number),
            records=self._records,
            retry=self.retry,
            stop=self.stop,
            meter=meter,
        )
        started = self._stopwatch.start()
        try:
            overtaken = not attempt.make(engines)
        finally:
            seconds = self._stopwatch.stop(started)
        stat = attempt.tally.make_stat(number, seconds=seconds, waiting=engines.waiting(p.engines))
        if not overtaken:
            path = table_path(run.folder / "stats", p.folder, number)
            provenance = tables.Provenance(stage="stats", name="", version=1, slice={}, inputs={})
            tables.write_rows(path, Stat, [stat], provenance)
        return ShardResult(stat=stat, overtaken=overtaken)


class WorkerJob:
    """What a worker process does: makes shards with engines of its own, which stay open for the whole pass."""

    def __init__(self, folder: Path, shards: str, stale: Stale, retry: frozenset[str]) -> None:
        self._state = RunState(config.load(folder), shards=shards, stale=stale)
        self._stop = threading.Event()
        self._maker = ShardMaker(self._state, stop=self._stop, retry=retry)
        self._engines = EnginePool(self._state.run.engines)
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
            self._engines.close_all_but(p.engines if p is not None else ())
            self._current = p
