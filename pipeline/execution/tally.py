"""Counts of a shard's rows, tokens and errors, the error limit, and the time that overlapping attempts took."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import PurePosixPath

from pipeline.errors import ShardFailedError
from pipeline.progress import ProgressMeter
from pipeline.records import NOT_TAKEN, Record, Stat, status_of

MAX_EXTENSIONS = 5  # in a message
MAX_BESIDE = 10  # images that a sample may leave beside the one that it takes
MIN_ROWS = 200  # of a shard before its share of failed rows counts


class SharedStopwatch:
    """Divides time evenly among the attempts in progress, so that their seconds add up to the process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running, self._changed_at = 0, time.monotonic()
        self._share = 0.0  # seconds, of an attempt that has run since the start

    def start(self) -> float:
        """Returns what `stop` needs."""
        return self._change_running(1)

    def read(self, started: float) -> float:
        """Seconds of the attempt so far."""
        return self._change_running(0) - started

    def stop(self, started: float) -> float:
        """Seconds of the attempt."""
        return self._change_running(-1) - started

    def _change_running(self, difference: int) -> float:
        with self._lock:
            now = time.monotonic()
            self._share += (now - self._changed_at) / max(1, self._num_running)
            self._changed_at, self._num_running = now, self._num_running + difference
            return self._share


class ShardTally:
    """Counts one shard's rows, and fails the shard when too many of them have failed."""

    def __init__(self, meter: ProgressMeter, *, max_error_share: float, counts_tokens: bool = True) -> None:
        """`counts_tokens` is False where rows have the tokens of others."""
        self.meter, self.max_error_share, self._counts_tokens = meter, max_error_share, counts_tokens
        self.started_at = time.time()
        self.num_rows = self.num_new = self.num_errors = self.num_not_taken = 0
        self.num_retries = self.num_prompt_tokens = self.num_output_tokens = 0
        self.messages: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.extensions: Counter[str] = Counter()  # of the corpus's files that failed

    def restore(self, row: Record, *, is_carried: bool = False) -> None:
        """Counts a row of an earlier attempt; one that is carried from the table that is retried cost nothing since."""
        self._count_status(row)
        if not is_carried:
            self._count_tokens(row)
        self.meter.add(0, 0, restored=1)

    def count(self, row: Record) -> None:
        """
        Raises:
            ShardFailedError: more than `max_error_share` of the rows have failed.
        """
        self._count_status(row)
        self.num_new += 1
        self._count_tokens(row)
        self.meter.count(row, counts_tokens=self._counts_tokens)
        if status_of(row) in row.failed:
            # Messages begin with what they have in common: "the answer is no JSON: Expecting value at 7".
            error = getattr(row, "error", None) or "no message"
            common = f"{status_of(row)}: {error.partition(': ')[0]}"
            self.messages[common] += 1
            self.examples.setdefault(common, error)
            if ending := PurePosixPath(getattr(row, "source_key", "")).suffix:
                self.extensions[ending.lower()] += 1
        num_failed, num_rows = self._count_failures()
        is_enough = num_rows >= MIN_ROWS or (num_failed > self.num_errors and self.num_rows >= MIN_ROWS)
        if is_enough and num_failed > self.max_error_share * num_rows:
            raise ShardFailedError(self._describe_failure())

    def _count_tokens(self, row: Record) -> None:
        if self._counts_tokens:
            self.num_retries += max(0, getattr(row, "attempt", 1) - 1)
            self.num_prompt_tokens += getattr(row, "num_prompt_tokens", None) or 0
            self.num_output_tokens += getattr(row, "num_output_tokens", None) or 0

    def _count_status(self, row: Record) -> None:
        self.num_rows += 1
        self.num_not_taken += _is_not_taken(row)
        self.num_errors += status_of(row) in row.failed and not _is_not_taken(row)

    def _count_failures(self) -> tuple[int, int]:
        """The failed rows, and all rows, that count towards the share.

        Images that their sample does not take do not: a mask or thumbnail beside each photograph does not mean a
        wrong setting. Only those beyond MAX_BESIDE for each other row count, since then keys that end at the wrong
        dot make one sample of a whole corpus.
        """
        num_others = self.num_rows - self.num_not_taken
        num_excess = max(0, self.num_not_taken - MAX_BESIDE * num_others)
        return self.num_errors + num_excess, num_others + num_excess

    def make_stat(
        self,
        *,
        stage: str,
        name: str,
        caption: str,
        shard: int,
        seconds: float,
        waiting: float | None,
        retried: Stat | None = None,
    ) -> Stat:
        """The statistics of the table, with what was spent on the one that it retries."""
        return Stat(
            stage=stage,
            name=name,
            caption=caption,
            shard=shard,
            started_at=self.started_at,
            seconds=seconds + (retried.seconds if retried else 0.0),
            num_rows=self.num_rows,
            num_new_rows=self.num_new,
            num_errors=self.num_errors,
            num_retries=self.num_retries,
            num_prompt_tokens=self.num_prompt_tokens + (retried.num_prompt_tokens if retried else 0),
            num_output_tokens=self.num_output_tokens + (retried.num_output_tokens if retried else 0),
            waiting=waiting,
            host=platform.node(),
            pid=os.getpid(),
            code_version=version("recap-pipeline"),
        )

    def _describe_failure(self) -> str:
        num_failed, num_rows = self._count_failures()
        message, num = "from an earlier attempt", num_failed
        if self.messages:
            message, num = self.messages.most_common(1)[0]
        example = f", e.g. {self.examples[message]}" if message in self.examples else ""
        return (
            f"{num_failed} of its first {num_rows} rows failed, more than max_error_share ="
            f" {self.max_error_share}; the commonest message ({num} times): {message}{example}{self._list_extensions()}"
        )

    def _list_extensions(self) -> str:
        """The extensions of the files that failed, commonest first; "" for rows that are not files."""
        counts = ", ".join(f"{num} {end}" for end, num in self.extensions.most_common(MAX_EXTENSIONS))
        return f"; among them {counts} (a folder's source.exclude leaves files out)" if counts else ""


def _is_not_taken(row: Record) -> bool:
    return str(getattr(row, "error", "")).startswith(NOT_TAKEN)
