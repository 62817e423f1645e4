"""Limits of a run: the hours and tokens that it may take, over all its processes, and what it has taken so far."""

from __future__ import annotations

import threading
import time

from pipeline.progress import format_count
from pipeline.sections import Run
from pipeline.storage import database, parts

SPENT = "SELECT coalesce(sum(seconds), 0) / 3600, coalesce(sum(num_prompt_tokens + num_output_tokens), 0) FROM stats"


class Budget:
    """The limits `max_hours` and `max_tokens`. Thread-safe.

    What all shards took is read once, from the statistics of the finished and the saved rows of the unfinished. Other
    processes that work at the same time count in the next command.
    """

    def __init__(self, run: Run, *, num_procs: int) -> None:
        self._max_hours, self._max_tokens, self._num_procs = run.max_hours, run.max_tokens, num_procs
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._hours, self._tokens = self._read_spent(run)

    def _read_spent(self, run: Run) -> tuple[float, int]:
        if self._max_hours is None and self._max_tokens is None:
            return 0.0, 0
        with database.connect_run(run) as connection:
            ((hours, tokens),) = database.query_rows(connection, SPENT)
        seconds, more = parts.read_spent(run.folder)
        return float(hours) + seconds / 3600, int(tokens) + more

    def spend(self, tokens: int) -> None:
        with self._lock:
            self._tokens += tokens

    def describe_excess(self) -> str:
        """The limit that is reached, and what to do; "" while none is."""
        hours = self._hours + (time.monotonic() - self._start) / 3600 * self._num_procs
        if self._max_tokens is not None and self._tokens >= self._max_tokens:
            reached = f"max_tokens = {format_count(self._max_tokens)} is reached with {format_count(self._tokens)}"
        elif self._max_hours is not None and hours >= self._max_hours:
            reached = f"max_hours = {self._max_hours:g} is reached"
        else:
            return ""
        return f"{reached}; raise it in run.toml, and the same command resumes"
