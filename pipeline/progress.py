"""Messages and progress on stderr; stdout is data."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pipeline.records import Record, status_of

# C0, DEL and C1; marks, embeddings and isolates of writing direction; line separators; lone surrogates.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
FIRST_REPORT = 5.0  # seconds after which a wait for a server or a model is reported
FIRST_STALL = 9.0  # seconds without a row after which that is reported
RELAY_INTERVAL = 0.5  # seconds between progress messages of a worker process
MIN_SECONDS, MIN_ROWS = 5.0, 20  # one of them has to pass before the time left is estimated
EARLY_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # of tqdm, without the time left
LINE_INTERVAL = 60.0  # seconds between progress lines when stderr is not a terminal, as in a Slurm log


def escape_controls(text: str, *, keep: str = "\n\t") -> str:
    r"""Text with control characters and marks of writing direction as escapes, so that it cannot rule a terminal.

    >>> escape_controls("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return CONTROLS.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def say(message: str) -> None:
    """Prints a line for the user, above any progress bar."""
    message = escape_controls(message)
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


class Patience:
    """When to report that something takes long: after some seconds, then each time after twice as many."""

    def __init__(self, first: float | None = None) -> None:
        self.next = FIRST_REPORT if first is None else first  # seconds

    def is_due(self, waited: float) -> bool:
        if waited < self.next:
            return False
        self.next = max(2 * self.next, 1.5 * waited)
        return True


@contextmanager
def report_waiting(what: str) -> Iterator[None]:
    """Reports how long the block has taken, ever more rarely, while it runs."""
    ended, start, patience = threading.Event(), time.monotonic(), Patience()

    def report() -> None:
        while not ended.wait(max(0.0, start + patience.next - time.monotonic())):
            waited = time.monotonic() - start
            if patience.is_due(waited):
                say(f"recap: {what}: {format_duration(waited)} so far")

    threading.Thread(target=report, name="reporter", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def format_count(num: float) -> str:
    """A count with thousands separators.

    >>> format_count(1234567)
    '1,234,567'
    """
    return f"{num:,.0f}"


def format_quantity(num: int, noun: str) -> str:
    """A count with its noun, whose plural ends in s.

    >>> format_quantity(1, "shard")
    '1 shard'
    """
    return f"{format_count(num)} {noun if num == 1 else f'{noun}s'}"


def format_bytes(num: float) -> str:
    """A number of bytes, in decimal units.

    >>> format_bytes(1_234_567)
    '1.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.1f} {unit}" if unit != "bytes" else f"{num:.0f} {unit}"
        num /= 1000
    return f"{num:,.1f} TB"


def format_rate(num: float) -> str:
    """A number per second, with a decimal below 10.

    >>> format_rate(0.25)
    '0.2'
    """
    return f"{num:.1f}" if num < 9.95 else format_count(num)


def format_duration(seconds: float) -> str:
    """
    >>> format_duration(3725)
    '1 h 02 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds_left = divmod(round(seconds), 60)
    return f"{minutes} min {seconds_left:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressMeter:
    """Counts the rows of one pass: a bar in a terminal, a line a minute elsewhere. Thread-safe."""

    def __init__(
        self, title: str, *, num_shards: int, num_rows: int | None, on_tokens: Callable[[int], None] = lambda _: None
    ) -> None:
        """`on_tokens` is called with the tokens of new rows."""
        self._on_tokens = on_tokens
        self.title, self.num_shards, self.num_rows = title, num_shards, num_rows
        self.rows = self.failed = self.restored = self.shards = 0
        self._lock = threading.Lock()
        self._patience = Patience(FIRST_STALL)
        self._start = self._printed_at = self._changed_at = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressMeter:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.num_rows, desc=self.title, unit=" rows", file=sys.stderr, dynamic_ncols=True)
            self._bar.bar_format = EARLY_BAR if self.num_rows else None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print_line()

    def count(self, row: Record, *, counts_tokens: bool = True) -> None:
        tokens = sum(getattr(row, name, None) or 0 for name in ("num_prompt_tokens", "num_output_tokens"))
        self.add(1, int(status_of(row) in row.failed), tokens=tokens if counts_tokens else 0)

    def add(self, rows: int, failed: int, restored: int = 0, tokens: int = 0) -> None:
        """
        Args:
            rows: number of rows made.
            failed: how many of them failed.
            restored: rows of an earlier attempt, which took no time.
            tokens: of their prompts and answers.
        """
        if tokens:
            self._on_tokens(tokens)
        with self._lock:
            self._changed_at = time.monotonic()
            self.rows += rows
            self.failed += failed
            self.restored += restored
            if self._bar is not None:
                self._bar.total = None if self.num_rows is None else self.num_rows - self.restored
                if self._is_measured(time.monotonic()):
                    self._bar.bar_format = None  # tqdm's own
                self._bar.update(rows)
            elif time.monotonic() - self._printed_at > LINE_INTERVAL:
                self._print_line()

    def report_stall(self) -> None:
        """Reports that no row was made for long, and then only for longer than ever before."""
        waited = time.monotonic() - self._changed_at
        if self._patience.is_due(waited):
            say(f"recap: {self.title}: no new row for {format_duration(waited)}")

    def shard_done(self) -> None:
        with self._lock:
            self.shards += 1
            if self._bar is not None:
                self._bar.set_postfix_str(f"shard {self.shards}/{self.num_shards}, {format_count(self.failed)} failed")

    def _is_measured(self, now: float) -> bool:
        return self.rows > 0 and (now - self._start >= MIN_SECONDS or self.rows >= MIN_ROWS)

    def _print_line(self) -> None:
        self._printed_at = time.monotonic()
        seconds = max(self._printed_at - self._start, 1e-9)
        rate = self.rows / seconds
        unfinished = max(0, (self.num_rows or 0) - self.restored - self.rows) if self.shards < self.num_shards else 0
        left = (
            f", {format_duration(unfinished / rate)} left" if unfinished and self._is_measured(self._printed_at) else ""
        )
        say(
            f"{self.title}: shard {self.shards}/{self.num_shards}, {format_count(self.rows)} rows, "
            f"{rate:,.1f} rows/s, {format_count(self.failed)} failed{left}"
        )


class ProgressRelay(ProgressMeter):
    """Counts in a worker process, and sends the counts to the meter in the parent."""

    def __init__(self, send: Callable[[tuple[int, int, int, int]], None]) -> None:
        super().__init__("", num_shards=1, num_rows=None)
        self._send, self._tokens = send, 0

    def add(self, rows: int, failed: int, restored: int = 0, tokens: int = 0) -> None:
        self._tokens += tokens
        self.rows += rows
        self.failed += failed
        self.restored += restored
        if time.monotonic() - self._printed_at > RELAY_INTERVAL:
            self.flush()

    def flush(self) -> None:
        self._send((self.rows, self.failed, self.restored, self._tokens))
        self.rows = self.failed = self.restored = self._tokens = 0
        self._printed_at = time.monotonic()
