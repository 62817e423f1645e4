"""One attempt at one shard of one pass: makes only unfinished rows, and puts a whole table in place or none.

Finished rows are saved as parts and merged at the end. Which shards are due, and what a row means, is known elsewhere.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from pathlib import Path
from typing import Any

from pipeline.engines import Engine
from pipeline.errors import OvertakenError, StoppedError
from pipeline.execution.passes import COPIES, Pass, Payload, Shard
from pipeline.execution.tally import ShardTally
from pipeline.progress import ProgressMeter
from pipeline.records import Record, column_names, make_storable, status_of
from pipeline.storage import tables
from pipeline.storage.layout import table_path, work_folder
from pipeline.storage.parts import Parts
from pipeline.storage.payloads import digest_payload, read_intact_footer


@dataclass(kw_only=True)
class Attempt:
    """One attempt at one shard of one pass."""

    p: Pass
    shard: Shard
    provenance: tables.Provenance  # of the table to make
    records: Mapping[str, type[Record]]  # folder of a table that is read -> its record
    retry: frozenset[str]  # statuses whose rows are made again; without effect on tables without statuses
    stop: threading.Event
    meter: ProgressMeter
    clock: Callable[[], float] = lambda: 0.0  # the seconds that it has taken so far
    before_commit: Callable[[], None] = lambda: None  # called when the table is written, before it is in place

    def __post_init__(self) -> None:
        self.run = self.shard.run.folder
        if "status" not in column_names(self.p.record):
            self.retry = frozenset()
        self.path = table_path(self.run, self.p.folder, self.shard.number)
        self.before = read_intact_footer(self.run, self.path)
        self.before_time = self.path.stat().st_mtime if self.before else 0.0  # when it was put in place, or before
        retry_of = (self.before.digest, *sorted(self.retry)) if self.retry and self.before else ()
        work = work_folder(self.run, self.p.folder, self.shard.number)
        self.parts = Parts(work, self.p.record, self.provenance, retry_of=retry_of, clock=self.clock)
        self.tally = ShardTally(self.meter, max_error_share=self.p.max_error_share, counts_tokens=self.p.part != COPIES)
        if self.retry and self.before:
            self.shard.retry_of = (self.before.digest,)

    @property
    def is_retry(self) -> bool:
        """True when rows of the table in place are carried into the new one."""
        return bool(self.retry and self.before and self.before.provenance == self.provenance)

    def make(self, engines: Mapping[str, Engine]) -> bool:
        """Puts the table in place; returns False if another process did so first.

        Raises:
            StoppedError: a signal came; finished rows are saved.
            ShardFailedError: too many rows failed.
            BrokenTableError, EngineDiedError, OSError, ...: the machine failed; finished rows are saved.
        """
        try:
            with closing(self.shard):
                if self.before and self.before.provenance == self.provenance and not self.retry:
                    raise OvertakenError
                for folder in self.p.reads:
                    tables.verify_checksums(table_path(self.run, folder, self.shard.number), self.records[folder])
                with self._open_payload() as payload:
                    self._write_table(engines, payload)
        except (OvertakenError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and not self._is_replaced():
                raise  # otherwise the other process, having finished, removed our parts
            self.parts.discard()
            return False
        return True

    def _write_table(self, engines: Mapping[str, Engine], payload: Payload | None) -> None:
        done = {row.id for row in (self._read_unretried() if payload else self._restore_rows())}
        try:
            for row in self._make_rows(done, engines, payload):
                if self.parts.add(row):
                    self._check_overtaken()
        except BaseException:  # Ctrl-C too: finished rows are saved
            with suppress(OSError, ValueError, MemoryError):  # the disk, a row or memory may be what failed
                self.parts.flush()
            raise
        self._check_overtaken()
        with (
            tables.open_atomic(self.path, work=self.parts.folder) as file,
            tables.TableWriter(file, self.p.record, self.provenance) as writer,
        ):
            for row in self.parts.merge():
                writer.add(row)
            expected = self.tally.num_new + len(done)
            assert writer.num_rows == expected, f"{self.p.title}: {writer.num_rows} rows of {expected} were written"
            if payload:
                sizes = payload.commit()
                writer.payload = {name: int(size) for name, size in sizes.items()}
                writer.payload_sha256 = digest_payload(self.run, sizes)
            self.before_commit()
        for name in self.before.payload.keys() - writer.payload.keys() if self.before else ():
            self._remove_earlier(self.run / name)
        self.parts.discard()

    def _remove_earlier(self, file: Path) -> None:
        """Removes a payload file of the earlier table, unless another shard has written it since."""
        with suppress(FileNotFoundError):
            if file.stat().st_mtime <= self.before_time:
                file.unlink()

    def _restore_rows(self) -> Iterator[Record]:
        """Rows that need not be made again: those of the table that is retried, and of earlier attempts."""
        for row in self.parts.carry(self._read_unretried):
            self.tally.restore(row, is_carried=True)
            yield row
        for row in self.parts.adopt():
            self.tally.restore(row)
            yield row

    def _read_unretried(self) -> Iterator[Record]:
        """The rows of the table that is retried, without those that are made again; none if its provenance differs."""
        if self.is_retry:
            rows = tables.read_rows(self.path, self.p.record)
            yield from (row for row in rows if status_of(row) not in self.retry)

    def _make_rows(self, done: set[Any], engines: Mapping[str, Engine], payload: Payload | None) -> Iterator[Record]:
        pending: deque[Any] = deque()  # ids of the rows that `work` owes
        stopped = threading.Event()  # set in the thread that draws inputs, which may be an engine's

        def draw_inputs() -> Iterator[Any]:
            for item in self.p.inputs(self.shard):
                if item.id in done:
                    continue
                if self.stop.is_set():
                    stopped.set()
                    return
                pending.append(item.id)
                yield item

        def make_outputs() -> Iterator[Any]:
            for output in self.p.work(draw_inputs(), engines):
                assert output.id == pending[0], f"{self.p.title} gave row {output.id} for input {pending[0]}"
                pending.popleft()
                yield output

        carried = self._read_unretried() if payload else ()
        for output in merge(carried, make_outputs(), key=attrgetter("id")):
            if payload and self.p.restore and output.id in done:
                self.tally.restore(output, is_carried=True)
                yield payload.take(self.p.restore(self.shard, output))
                continue
            row = make_storable(payload.take(output) if payload else output)
            self.tally.count(row)
            yield row
        if stopped.is_set():
            raise StoppedError
        assert not pending, f"{self.p.title} gave no row for {len(pending)} inputs, {pending[0]} the first"

    @contextmanager
    def _open_payload(self) -> Iterator[Payload | None]:
        payload = self.p.payload(self.shard)
        try:
            yield payload
        except BaseException:  # Ctrl-C too: no payload is left unfinished
            if payload:
                payload.abandon()
            raise

    def _check_overtaken(self) -> None:
        """
        Raises:
            OvertakenError: the table that this attempt makes is in place. A retry replaces it.
        """
        if not self.retry and self._is_replaced():
            raise OvertakenError

    def _is_replaced(self) -> bool:
        """True if another process has put the table in place since this attempt began."""
        now = read_intact_footer(self.run, self.path)
        return now is not None and now.provenance == self.provenance and now != self.before
