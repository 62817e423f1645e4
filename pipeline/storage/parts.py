"""Parts: finished rows of an unfinished shard, in immutable files that survive a kill.

A part is a small table outside every table's glob, renamed into place, with the provenance of the table that it will
join. Any process may adopt the parts of an earlier attempt or of another process; of rows with one id, the first wins.
A retry has parts of its own, since those of the table that it replaces hold the rows to be made again.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from heapq import merge
from pathlib import Path
from typing import Any

from pipeline.errors import BrokenTableError
from pipeline.records import Record, status_of
from pipeline.storage import tables
from pipeline.storage.layout import is_old, sweep_unfinished

MAX_AGE = 20.0  # seconds that a finished row waits for its part: at most this much finished work is lost by a kill
MAX_ROWS = 5_000  # rows held in memory
SECONDS_KEY = "recap.seconds"  # in a part's Parquet footer: of its attempt since the part before
TOKENS = ("num_prompt_tokens", "num_output_tokens")


class Parts:
    """The rows of one shard of one pass, while they are being made."""

    def __init__(
        self,
        folder: Path,
        record: type[Record],
        provenance: tables.Provenance,
        *,
        retry_of: tuple[str, ...] = (),
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """
        Args:
            folder: for the parts.
            record: of their rows.
            provenance: of the table to make.
            retry_of: the digest of the table that is retried, and the statuses; () where a table is made.
            clock: the seconds that the attempt has taken so far.
        """
        self.folder = folder
        self.adopted_seconds = 0.0  # that the adopted parts took
        self._clock, self._saved_seconds = clock, 0.0
        self._retry = "".join(f"-{text}" for text in retry_of)
        self._record, self._provenance = record, provenance
        self._adopted: list[Callable[[], Iterator[Record]]] = []
        self._own: list[Path] = []
        self._rows: list[Record] = []
        self._since = time.monotonic()

    def adopt(self) -> Iterator[Record]:
        """Takes over the rows of all parts with this provenance, and yields them.

        Rows with status "error" are left out: their requests failed, and retrying is cheap.
        """
        for path in sorted(self.folder.glob(f"{self._prefix}-*.parquet")):
            try:
                tables.verify_checksums(path, self._record)
            except BrokenTableError:
                path.unlink(missing_ok=True)  # a part is only a cache: its rows are made again
                continue
            self.adopted_seconds += _read_seconds(path)
            yield from self.carry(partial(self._read_good_rows, path))

    def _read_good_rows(self, path: Path) -> Iterator[Record]:
        return (row for row in tables.read_rows(path, self._record) if status_of(row) != "error")

    def carry(self, rows: Callable[[], Iterator[Record]]) -> Iterator[Record]:
        """Takes over rows, sorted by id, and yields them. `rows` is called again when the table is merged."""
        yield from rows()
        self._adopted.append(rows)

    def add(self, row: Record) -> bool:
        """Adds a finished row; returns whether rows were saved."""
        self._rows.append(row)
        due = len(self._rows) >= MAX_ROWS or time.monotonic() - self._since > MAX_AGE
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Saves all finished rows."""
        if self._rows:
            path = self.folder / f"{self._prefix}-{uuid.uuid4().hex[:12]}.parquet"
            seconds = self._clock()
            with (
                tables.open_atomic(path, durable=False) as file,
                tables.TableWriter(file, self._record, self._provenance) as writer,
            ):
                for row in self._rows:
                    writer.add(row)
                writer.add_metadata({SECONDS_KEY: repr(seconds - self._saved_seconds)})
            self._saved_seconds = seconds
            self._own.append(path)
            self._rows = []
        self._since = time.monotonic()

    def merge(self) -> Iterator[Record]:
        """All rows, each id once, sorted by id."""
        own = [tables.read_rows(path, self._record) for path in self._own]
        last: Any = None
        for row in merge(*(rows() for rows in self._adopted), *own, self._rows, key=lambda row: row.id):
            if row.id != last:
                yield row
            last = row.id

    def discard(self) -> None:
        """Removes the parts of the table that is in place, other processes' too, and what was abandoned.

        Work on another table of this shard, with another configuration or a retry, may be in use and stays.
        """
        for path in self.folder.glob("*.parquet"):
            with suppress(OSError):
                if path.name.startswith(f"{self._prefix}-") or is_old(path):
                    path.unlink()
        with suppress(OSError):
            (self.folder / "failed.json").unlink(missing_ok=True)
            sweep_unfinished(self.folder)
            self.folder.rmdir()

    @property
    def _prefix(self) -> str:
        fingerprint = self._provenance.fingerprint[:16]
        return f"{fingerprint}_{hashlib.sha256(self._retry.encode()).hexdigest()[:16]}" if self._retry else fingerprint


def _read_seconds(path: Path) -> float:
    """The seconds of its attempt that a part has; 0 for one of an earlier version."""
    import pyarrow.parquet as pq

    return float((pq.read_metadata(path).metadata or {}).get(SECONDS_KEY.encode(), 0.0))


def read_spent(run: Path) -> tuple[float, int]:
    """The seconds and tokens of all finished rows of unfinished shards."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    seconds, tokens = 0.0, 0
    for path in (run / ".work").rglob("*.parquet"):
        with suppress(OSError, pa.ArrowException):  # it was adopted and removed, or is damaged and will be
            seconds += _read_seconds(path)
            names = set(TOKENS).intersection(pq.read_schema(path).names)
            rows = pq.read_table(path, columns=sorted(names))
            tokens += sum(pc.sum(column).as_py() or 0 for column in rows.columns)
    return seconds, tokens


def write_failure(folder: Path, message: str) -> None:
    """Saves the error of a failed shard for `recap status`, until the shard succeeds."""
    with tables.open_atomic(folder / "failed.json") as file:
        file.write(json.dumps({"message": message, "time": time.time()}).encode())


def read_failure(folder: Path) -> str | None:
    """The error of the shard's last attempt; None if it did not fail, or if the file cannot be read."""
    try:
        return str(json.loads((folder / "failed.json").read_bytes())["message"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
