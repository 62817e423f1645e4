"""Makes single shards of a run, and records their statistics."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import partial

from pipeline.errors import BrokenTableError
from pipeline.execution.attempt import Attempt
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.passes import COPIES, AllShards, Pass, Shard
from pipeline.execution.shared_work import ensure_shared
from pipeline.execution.states import ShardStates
from pipeline.execution.tally import SharedStopwatch
from pipeline.progress import ProgressMeter
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

    states: ShardStates
    _: KW_ONLY
    stop: threading.Event
    retry: frozenset[str]  # statuses whose rows are made again
    limit: int | None = None  # inputs of a shard

    def __post_init__(self) -> None:
        self._records = {p.folder: p.record for p in self.states.passes.values()}
        self._stopwatch = SharedStopwatch()

    def make(self, p: Pass, number: int, engines: EnginePool, meter: ProgressMeter) -> ShardResult:
        """Makes one shard of one pass and records its statistics; raises what `Attempt.make` raises."""
        run, stats = self.states.run, list[Stat]()
        started = self._stopwatch.start()

        def make_stat() -> None:
            seconds = self._stopwatch.stop(started) + attempt.parts.adopted_seconds
            stats.append(
                attempt.tally.make_stat(
                    stage=p.part if p.part == COPIES else p.stage,
                    name=p.name,
                    caption=p.caption,
                    shard=number,
                    seconds=seconds,
                    waiting=engines.waiting(p.engines),
                    retried=self._read_retried(p, number) if attempt.is_retry else None,
                )
            )

        def save_stat() -> None:  # before the table: a shard that is killed after its table is not made again
            make_stat()
            path = table_path(run.folder / "stats", p.folder, number)
            provenance = tables.Provenance(stage="stats", name="", version=1, slice={}, inputs={})
            tables.write_rows(path, Stat, stats, provenance, work=attempt.parts.folder)

        provenance = self.states.provenance(p, number)
        shards = AllShards(run=run, num_shards=self.states.plan.num_shards, stop=self.stop)
        attempt = Attempt(
            p=p,
            shard=Shard(
                run=run,
                number=number,
                pieces=self.states.plan.pieces(number),
                limit=self.limit,
                ensure_shared=partial(ensure_shared, p, shards, provenance),
            ),
            provenance=provenance,
            records=self._records,
            retry=self.retry,
            stop=self.stop,
            meter=meter,
            clock=partial(self._stopwatch.read, started),
            before_commit=save_stat,
        )
        try:
            overtaken = not attempt.make(engines)
        finally:
            if not stats:
                make_stat()
        return ShardResult(stat=stats[0], overtaken=overtaken)

    def _read_retried(self, p: Pass, number: int) -> Stat | None:
        """The statistics of the table that is made again."""
        with suppress(FileNotFoundError, BrokenTableError):  # nothing but sums depends on them
            return next(tables.read_rows(table_path(self.states.run.folder / "stats", p.folder, number), Stat), None)
        return None
