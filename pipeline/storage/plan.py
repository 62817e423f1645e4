"""Decides which shard holds which inputs, once: the plan is frozen, and growth only appends shards at its end.

Also how people and Slurm write sets of shards. It does not know what a sample is.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import SpecError, UserError
from pipeline.records import Piece, Planned
from pipeline.storage import tables

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARDS = 1_000_000  # six digits in the key


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Some shards of the plan: shard -> pieces."""

    num_shards: int  # of the whole plan
    rows: pa.Table  # sorted by shard; only of the shards asked for

    @classmethod
    def load(cls, path: Path, shards: str = "all") -> tuple[Plan, Sequence[int]]:
        """The plan and the shards that the spec names; reads only the row groups which hold them.

        Raises:
            FileNotFoundError: nothing is planned.
            SpecError: the spec is wrong, or names a shard that the plan does not have.
        """
        import pyarrow.parquet as pq

        num_shards = count_shards(path)
        wanted = parse_spec(shards, num_shards)
        lo, hi = (wanted[0], wanted[-1]) if wanted else (0, -1)
        with pq.ParquetFile(path) as file:
            spans = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
            groups = [i for i, span in enumerate(spans) if span.max >= lo and span.min <= hi]
            return cls(num_shards=num_shards, rows=file.read_row_groups(groups)), wanted

    def pieces(self, shard: int) -> list[Piece]:
        return [Planned(**row).piece for row in self._slice(shard)]

    def digest(self, shard: int) -> str:
        """Of the shard's pieces, hex: the input of its ingest."""
        return _digest(self._slice(shard))

    def digests(self) -> Iterator[str]:
        """Of every shard, when all were asked for."""
        rows = (row for batch in self.rows.to_batches() for row in batch.to_pylist())
        for _, of_shard in groupby(rows, key=itemgetter("shard")):
            yield _digest(list(of_shard))

    def num_samples(self, shard: int) -> int | None:
        """How many inputs the shard has, where the plan can know it."""
        counts = [piece.num_samples for piece in self.pieces(shard)]
        return None if None in counts else sum(count_shards for count_shards in counts if count_shards is not None)

    def _slice(self, shard: int) -> list[dict[str, Any]]:
        column = self._shards
        start, stop = bisect_left(column, shard), bisect_left(column, shard + 1)
        rows: list[dict[str, Any]] = self.rows.slice(start, stop - start).to_pylist()
        return rows

    @cached_property
    def _shards(self) -> array[int]:
        return array("q", self.rows.column("shard").to_pylist())


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_plan(
    path: Path, pieces: Iterable[Piece], *, shard_size: int, place: Callable[[str], str] = str
) -> tuple[int, int]:
    """Writes the plan, or extends it by what it does not have yet. Planned shards never change.

    Args:
        path: plan.parquet.
        pieces: the whole corpus as it is now.
        shard_size: samples in a shard; a piece of unknown length is a shard of its own.
        place: where a piece's file lies: two names of one place are one file.

    Returns:
        How many shards there were, and are.
    """
    planned = list(tables.read_rows(path, Planned)) if path.exists() else []
    before = planned[-1].shard + 1 if planned else 0
    new = assign_shards(find_new_pieces(planned, pieces, place=place), shard_size=shard_size, first=before)
    first = next(new, None)
    if first is None and planned:
        return before, before
    rows = [*planned, *([] if first is None else [first]), *new]
    recipe = tables.Provenance(stage="plan", name="", version=1, slice={}, inputs={})
    tables.write_rows(path, Planned, rows, recipe)
    return before, rows[-1].shard + 1 if rows else 0


def find_new_pieces(
    planned: Iterable[Planned], pieces: Iterable[Piece], *, place: Callable[[str], str]
) -> Iterator[Piece]:
    """What of the corpus is not planned yet: new files, and the new end of those that grew."""
    ends: dict[str, int | None] = {}
    for row in planned:
        file = place(row.file)
        end = ends.get(file, 0)
        ends[file] = None if row.stop is None or end is None else max(end, row.stop)
    for piece in pieces:
        file = place(piece.file)
        end = ends.get(file, 0)
        if file not in ends:
            yield piece
        elif end is not None and piece.stop is not None and piece.stop > end:
            yield Piece(file=piece.file, start=end, stop=piece.stop, num_bytes=piece.num_bytes)


def assign_shards(pieces: Iterable[Piece], *, shard_size: int, first: int = 0) -> Iterator[Planned]:
    """Fills shards from `first` on, `shard_size` samples each, cutting pieces where a shard is full."""
    shard, room = first, shard_size
    for piece in pieces:
        if piece.stop is None:
            shard, room = (shard if room == shard_size else shard + 1), 0
            yield _planned(shard, piece, piece.start, None)
            continue
        start = piece.start
        while start < piece.stop:
            if room == 0:
                shard, room = shard + 1, shard_size
            stop = min(piece.stop, start + room)
            yield _planned(shard, piece, start, stop)
            start, room = stop, room - (stop - start)


def _planned(shard: int, piece: Piece, start: int, stop: int | None) -> Planned:
    if shard >= MAX_SHARDS:
        raise UserError(f"the corpus needs more than {MAX_SHARDS} shards; raise source.shard_size")
    return Planned(shard=shard, file=piece.file, start=start, stop=stop, num_bytes=piece.num_bytes)


def count_shards(path: Path) -> int:
    """How many shards are planned; reads the footer alone."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    groups = metadata.num_row_groups
    if groups == 0 or metadata.num_rows == 0:
        return 0
    last: int = metadata.row_group(groups - 1).column(0).statistics.max
    return last + 1


def parse_spec(spec: str, num_shards: int) -> Sequence[int]:
    """The shards that a spec names, ascending, each once.

    >>> list(parse_spec("3,5,8-11", 20))
    [3, 5, 8, 9, 10, 11]
    >>> list(parse_spec("1/3", 10))
    [3, 4, 5]

    Raises:
        SpecError: it does not read, or names a shard that is not planned.
    """
    if spec == "all":
        return range(num_shards)
    if block := re.fullmatch(r"([0-9]+)/([1-9][0-9]*)", spec):
        index, num = int(block[1]), int(block[2])
        if index >= num:
            raise SpecError(f"--shard {spec}: blocks of {num} are 0/{num} to {num - 1}/{num}")
        return range(index * num_shards // num, (index + 1) * num_shards // num)
    shards: set[int] = set()
    for part in spec.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([1-9][0-9]*))?)?", part)
        if not found:
            raise SpecError(f"--shard {spec}: {part!r} is none of 7, 0-9, 0-99:10, i/n, all, or a list of those")
        lo, hi, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if hi < lo or hi >= num_shards:
            raise SpecError(f"--shard {spec}: {part} is not within the plan's shards, 0-{num_shards - 1}")
        shards.update(range(lo, hi + 1, step))
    return sorted(shards)


def format_spec(shards: Iterable[int]) -> str:
    """Shards as a Slurm --array expression, the inverse of `parse_spec`.

    >>> format_spec([0, 1, 2, 3, 7, 9])
    '0-3,7,9'
    """
    runs: list[list[int]] = []
    for shard in sorted(set(shards)):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return ",".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
