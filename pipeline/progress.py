"""Decides what a person sees while it runs: everything here goes to stderr, for stdout is data."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeline.records import Record, status_of

RELAY = 0.5  # seconds between what a worker process says of its progress
QUIET = 60.0  # seconds between progress lines when stderr is no terminal, as in a Slurm log


def say(message: str) -> None:
    """One line for the user, above any progress bar."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def format_count(num: float) -> str:
    """A count as people read it.

    >>> short(1234567)
    '1,234,567'
    """
    return f"{num:,.0f}"


def format_duration(seconds: float) -> str:
    """
    >>> duration(3725)
    '1 h 02 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressMeter:
    """Counts the rows of one pass: a bar in a terminal, a line a minute elsewhere. Safe for several threads."""

    def __init__(self, title: str, *, num_shards: int, num_rows: int | None) -> None:
        self.title, self.num_shards, self.num_rows = title, num_shards, num_rows
        self.rows = self.failed = self.kept = self.shards = 0
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressMeter:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.num_rows, desc=self.title, unit=" rows", file=sys.stderr, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def count(self, row: Record) -> None:
        self.add(1, int(status_of(row) in row.failed))

    def add(self, rows: int, failed: int, kept: int = 0) -> None:
        """
        Args:
            rows: that were made.
            failed: of these.
            kept: rows of an earlier attempt, which need no time.
        """
        with self._lock:
            self.rows += rows
            self.failed += failed
            self.kept += kept
            if self._bar is not None:
                self._bar.total = None if self.num_rows is None else self.num_rows - self.kept
                self._bar.update(rows)
            elif time.monotonic() - self._said > QUIET:
                self._line()

    def shard_done(self) -> None:
        with self._lock:
            self.shards += 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"shard {self.shards}/{self.num_shards}, {format_count(self.failed)} failed")

    def _line(self) -> None:
        self._said = time.monotonic()
        seconds = max(self._said - self._start, 1e-9)
        rate = self.rows / seconds
        unfinished = max(0, (self.num_rows or 0) - self.kept - self.rows) if self.shards < self.num_shards else 0
        left = f", {format_duration(unfinished / rate)} left" if unfinished and rate else ""
        say(
            f"{self.title}: shard {self.shards}/{self.num_shards}, {format_count(self.rows)} rows, "
            f"{rate:,.1f} rows/s, {format_count(self.failed)} failed{left}"
        )


class ProgressRelay(ProgressMeter):
    """Counts in a worker process, for the meter of the process that hears it."""

    def __init__(self, tell: Callable[[tuple[int, int, int]], None]) -> None:
        super().__init__("", num_shards=1, num_rows=None)
        self._tell = tell

    def add(self, rows: int, failed: int, kept: int = 0) -> None:
        self.rows += rows
        self.failed += failed
        self.kept += kept
        if time.monotonic() - self._said > RELAY:
            self.flush()

    def flush(self) -> None:
        self._tell((self.rows, self.failed, self.kept))
        self.rows = self.failed = self.kept = 0
        self._said = time.monotonic()
