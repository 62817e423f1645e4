"""Decides how one shard of one pass is made: only what is unfinished is asked, and its table is whole or not there.

Finished rows are kept as parts and merged at the end. It does not know which shards are due, nor what a row is about.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pipeline.engines import Engine
from pipeline.errors import OvertakenError, ShardFailedError, StoppedError
from pipeline.execution.passes import Pass, Payload, Shard
from pipeline.progress import ProgressMeter
from pipeline.records import Record, Stat, status_of
from pipeline.storage import tables
from pipeline.storage.layout import table_path, work_folder
from pipeline.storage.parts import Parts
from pipeline.storage.payloads import read_intact_footer

SETTLED = 200  # rows of a shard before its share of failures means anything


@dataclass(kw_only=True)
class Attempt:
    """One try at one shard of one pass."""

    p: Pass
    shard: Shard
    provenance: tables.Provenance  # what decides its rows
    records: Mapping[str, type[Record]]  # folder of a table that is read -> its record
    retry: frozenset[str]  # statuses whose rows are asked for again
    stop: threading.Event
    meter: ProgressMeter
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.shard.run.folder
        self.path = table_path(self.run, self.p.folder, self.shard.number)
        self.before = read_intact_footer(self.run, self.path)
        self.parts = Parts(work_folder(self.run, self.p.folder, self.shard.number), self.p.record, self.provenance)
        self.tally = Tally(self.p, self.meter)
        if self.retry and self.before:
            self.shard.retry_of = (self.before.digest,)

    def make(self, engines: Mapping[str, Engine]) -> bool:
        """Puts the table in place; False when another process was faster.

        Raises:
            StoppedError: a signal came; the finished rows are kept.
            ShardFailedError: too many rows failed.
            BrokenTableError, EngineDiedError, OSError, ...: the machine failed; the finished rows are kept.
        """
        try:
            with closing(self.shard):
                self._give_way(if_repeated=True)
                for folder in self.p.reads:
                    tables.verify_checksums(table_path(self.run, folder, self.shard.number), self.records[folder])
                with self._payload() as payload:
                    self._fill(engines, payload)
        except (OvertakenError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and not self._is_replaced():
                raise  # else the other process took our parts away when it was done
            self.parts.discard()
            return False
        return True

    def _fill(self, engines: Mapping[str, Engine], payload: Payload | None) -> None:
        done = {row.id for row in self._kept(resumable=payload is None)}
        try:
            for row in self._new(done, engines, payload):
                if self.parts.add(row):
                    self._give_way()
        except BaseException:  # whatever ends it, finished rows are kept; raised again
            with suppress(OSError):  # the disk may be what failed
                self.parts.flush()
            raise
        self._give_way()
        with (
            tables.open_atomic(self.path, work=self.parts.folder) as file,
            tables.TableWriter(file, self.p.record, self.provenance) as writer,
        ):
            for row in self.parts.merged():
                writer.add(row)
            num_rows, kept = writer.num_rows, self.tally.new + len(done)
            assert num_rows == kept, f"{self.p.title}: {num_rows} rows came of {kept}: rows are conserved"
            if payload:
                writer.payload = payload.commit()
        self.parts.discard()

    def _kept(self, *, resumable: bool) -> Iterator[Record]:
        """The rows that need not be made again: of the table that is retried, and of unfinished attempts."""
        if not resumable:
            return
        if self.retry and self.before and self.before.provenance == self.provenance:
            for row in self.parts.carry(self._good):
                self.tally.keep(row)
                yield row
        for row in self.parts.adopt():
            self.tally.keep(row)
            yield row

    def _good(self) -> Iterator[Record]:
        return (row for row in tables.read_rows(self.path, self.p.record) if status_of(row) not in self.retry)

    def _new(self, done: set[Any], engines: Mapping[str, Engine], payload: Payload | None) -> Iterator[Record]:
        asked: deque[Any] = deque()
        cut = threading.Event()  # engines may draw the inputs in a thread of their own

        def unfinished() -> Iterator[Any]:
            for item in self.p.inputs(self.shard):
                if item.id in done:
                    continue
                if self.stop.is_set():
                    cut.set()
                    return
                asked.append(item.id)
                yield item

        for output in self.p.work(unfinished(), engines):
            assert output.id == asked[0], f"{self.p.title} gave row {output.id} for input {asked[0]}"
            asked.popleft()
            row = payload.take(output) if payload else output
            self.tally.count(row)
            yield row
        if cut.is_set():
            raise StoppedError
        assert not asked, f"{self.p.title} gave no row for {len(asked)} inputs, {asked[0]} the first"

    @contextmanager
    def _payload(self) -> Iterator[Payload | None]:
        payload = self.p.payload(self.shard)
        try:
            yield payload
        except BaseException:  # whatever ends it, no payload is left half written; raised again
            if payload:
                payload.abandon()
            raise

    def _give_way(self, *, if_repeated: bool = False) -> None:
        """
        Raises:
            OvertakenError: the table that is wanted is in place. A retry wants it again.
        """
        if self.retry:
            return
        if self._is_replaced() or (if_repeated and self.before and self.before.provenance == self.provenance):
            raise OvertakenError

    def _is_replaced(self) -> bool:
        """Whether the wanted table has come into place since this attempt began."""
        now = read_intact_footer(self.run, self.path)
        return now is not None and now.provenance == self.provenance and now != self.before


class Stopwatch:
    """Parts the time of a process among the attempts that are under way: what they get adds up to the time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way, self._at = 0, time.monotonic()
        self._got = 0.0  # seconds, by an attempt that began before all others and has not ended

    def begin(self) -> float:
        """What `end` is to be given."""
        return self._turn(1)

    def end(self, begun: float) -> float:
        """The seconds that the attempt got."""
        return self._turn(-1) - begun

    def _turn(self, more: int) -> float:
        with self._lock:
            now = time.monotonic()
            self._got += (now - self._at) / max(1, self._under_way)
            self._at, self._under_way = now, self._under_way + more
            return self._got


class Tally:
    """Counts one shard's rows, and stops it when too many have failed."""

    def __init__(self, p: Pass, meter: ProgressMeter) -> None:
        self.p, self.meter = p, meter
        self.started_at = time.time()
        self.rows = self.new = self.failed = self.errors = 0
        self.retries = self.prompt_tokens = self.output_tokens = 0
        self.messages: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def keep(self, row: Record) -> None:
        """One that was made before."""
        self._enter(row)
        self.meter.add(0, 0, kept=1)

    def count(self, row: Record) -> None:
        """
        Raises:
            ShardFailedError: more than `max_error_share` of the rows have failed.
        """
        self._enter(row)
        self.new += 1
        self.retries += max(0, getattr(row, "attempt", 1) - 1)
        self.prompt_tokens += getattr(row, "num_prompt_tokens", None) or 0
        self.output_tokens += getattr(row, "num_output_tokens", None) or 0
        self.meter.count(row)
        if status_of(row) in row.failed:
            self.failed += 1
            self._note(status_of(row), getattr(row, "error", None) or "no message")
        if self.rows >= SETTLED and self.errors > self.p.max_error_share * self.rows:
            raise ShardFailedError(self._why())

    def _enter(self, row: Record) -> None:
        self.rows += 1
        self.errors += status_of(row) in row.failed

    def stat(self, shard: int, *, seconds: float, waiting: float | None) -> Stat:
        return Stat(
            stage=self.p.stage,
            name=self.p.name,
            caption=self.p.caption,
            shard=shard,
            started_at=self.started_at,
            seconds=seconds,
            num_rows=self.rows,
            num_new_rows=self.new,
            num_errors=self.errors,
            num_retries=self.retries,
            num_prompt_tokens=self.prompt_tokens,
            num_output_tokens=self.output_tokens,
            waiting=waiting,
            host=platform.node(),
            pid=os.getpid(),
            code_version=version("recap-pipeline"),
        )

    def _note(self, status: str, error: str) -> None:
        """Errors begin with what they have in common: "the answer is no JSON: Expecting value at 7"."""
        common = f"{status}: {error.partition(': ')[0]}"
        self.messages[common] += 1
        self.examples.setdefault(common, error)

    def _why(self) -> str:
        commonest, num = self.messages.most_common(1)[0] if self.messages else ("of an earlier attempt", self.errors)
        example = f", e.g. {self.examples[commonest]}" if commonest in self.examples else ""
        return (
            f"{self.errors} of its first {self.rows} rows failed, more than max_error_share = {self.p.max_error_share}"
            f"; the commonest message ({num} times): {commonest}{example}"
        )
