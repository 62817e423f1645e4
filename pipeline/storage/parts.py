"""Decides how a shard that is being made survives being killed: finished rows lie in immutable part files.

A part is a small table, renamed into place, outside every table's glob and stamped like the table it will join. Any
process may adopt the parts of an earlier attempt, or of another process on the same shard: the first row of an id wins.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from pathlib import Path
from typing import Any

from pipeline.errors import BrokenTableError
from pipeline.records import Record, status_of
from pipeline.storage import tables

MAX_AGE = 20.0  # seconds that a finished row waits for its part: what a kill can cost, and the rows in flight
MAX_ROWS = 5_000  # rows held in memory


class Parts:
    """The rows of one shard of one pass, while they are being made."""

    def __init__(self, folder: Path, record: type[Record], recipe: tables.Provenance) -> None:
        self.folder = folder
        self._record, self._recipe = record, recipe
        self._adopted: list[Callable[[], Iterator[Record]]] = []
        self._own: list[Path] = []
        self._rows: list[Record] = []
        self._since = time.monotonic()

    def adopt(self) -> Iterator[Record]:
        """The rows of all parts which carry this fingerprint; they are in the table from now on.

        A row with status "error" is left behind: its request failed, and asking again is cheap.
        """
        for path in sorted(self.folder.glob(f"{self._prefix}-*.parquet")):
            try:
                tables.verify_checksums(path, self._record)
            except BrokenTableError:
                path.unlink(missing_ok=True)  # a part is a cache: what it held is made again
                continue
            yield from self.carry(lambda path=path: _sound(tables.read_rows(path, self._record)))  # type: ignore[misc]

    def carry(self, rows: Callable[[], Iterator[Record]]) -> Iterator[Record]:
        """Takes rows, sorted by id and readable again, into the table."""
        yield from rows()
        self._adopted.append(rows)

    def add(self, row: Record) -> bool:
        """Takes a finished row; says whether it was time to put rows on disk."""
        self._rows.append(row)
        due = len(self._rows) >= MAX_ROWS or time.monotonic() - self._since > MAX_AGE
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Puts all finished rows on disk."""
        if self._rows:
            path = self.folder / f"{self._prefix}-{uuid.uuid4().hex[:12]}.parquet"
            tables.write_rows(path, self._record, self._rows, self._recipe, durable=False)
            self._own.append(path)
            self._rows = []
        self._since = time.monotonic()

    def merge(self) -> Iterator[Record]:
        """Every row once, sorted by id."""
        own = [tables.read_rows(path, self._record) for path in self._own]
        last: Any = None
        for row in merge(*(rows() for rows in self._adopted), *own, self._rows, key=lambda row: row.id):
            if row.id != last:
                yield row
            last = row.id

    def discard(self) -> None:
        """Removes this shard's unfinished work, other processes' too: the table is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        return self._recipe.fingerprint[:16]


def write_failure(folder: Path, message: str) -> None:
    """Keeps why a shard failed, for `recap status`, until the shard succeeds."""
    with tables.open_atomic(folder / "failed.json") as file:
        file.write(json.dumps({"message": message, "time": time.time()}).encode())


def read_failure(folder: Path) -> str | None:
    """Why the shard failed when it was last tried; None when it did not, or what was kept of it does not read."""
    try:
        return str(json.loads((folder / "failed.json").read_bytes())["message"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _sound(rows: Iterable[Record]) -> Iterator[Record]:
    return (row for row in rows if status_of(row) != "error")
