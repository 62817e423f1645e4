"""The plan: which shard holds which pieces of the corpus, frozen once; growth only appends shards.

Also the notation of sets of shards, as --shard takes it. What a sample is, only sources know.
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
    rows: pa.Table  # sorted by shard; only of the loaded shards

    @classmethod
    def load(cls, path: Path, shards: str = "all") -> tuple[Plan, Sequence[int]]:
        """The plan and the shards that the spec names; reads only the row groups that hold them.

        Raises:
            FileNotFoundError: there is no plan.
            SpecError: the spec does not parse, or names a shard that the plan does not have.
        """
        import pyarrow.parquet as pq

        num_shards = count_shards(path)
        selected = parse_spec(shards, num_shards)
        first, last = (selected[0], selected[-1]) if selected else (0, -1)
        with pq.ParquetFile(path) as file:
            spans = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
            groups = [i for i, span in enumerate(spans) if span.max >= first and span.min <= last]
            return cls(num_shards=num_shards, rows=file.read_row_groups(groups)), selected

    def pieces(self, shard: int) -> list[Piece]:
        return [Planned(**row).piece for row in self._slice(shard)]

    def digest(self, shard: int) -> str:
        """The SHA-256 of the shard's pieces, hex: the input digest of its ingest."""
        return _hash_rows(self._slice(shard))

    def digests(self) -> Iterator[str]:
        """The digests of all loaded shards, in order."""
        rows = (row for batch in self.rows.to_batches() for row in batch.to_pylist())
        for _, shard_rows in groupby(rows, key=itemgetter("shard")):
            yield _hash_rows(list(shard_rows))

    def num_samples(self, shard: int) -> int | None:
        """The number of samples of the shard; None where only reading the corpus would show."""
        counts = [piece.num_samples for piece in self.pieces(shard)]
        return None if None in counts else sum(count_shards for count_shards in counts if count_shards is not None)

    def _slice(self, shard: int) -> list[dict[str, Any]]:
        start, stop = bisect_left(self._shards, shard), bisect_left(self._shards, shard + 1)
        rows: list[dict[str, Any]] = self.rows.slice(start, stop - start).to_pylist()
        return rows

    @cached_property
    def _shards(self) -> array[int]:
        return array("q", self.rows.column("shard").to_pylist())


def _hash_rows(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_plan(
    path: Path, pieces: Iterable[Piece], *, shard_size: int, place: Callable[[str], str] = str
) -> tuple[int, int]:
    """Writes the plan, or extends it with new pieces. Planned shards never change.

    Args:
        path: plan.parquet.
        pieces: of the whole corpus as it is now.
        shard_size: samples in a shard; a piece of unknown length is a shard of its own.
        place: maps a piece's file to its location; two names of one location are one file.

    Returns:
        The number of shards before and after.
    """
    planned = list(tables.read_rows(path, Planned)) if path.exists() else []
    before = planned[-1].shard + 1 if planned else 0
    new = assign_shards(find_new_pieces(planned, pieces, place=place), shard_size=shard_size, first=before)
    first = next(new, None)
    if first is None and planned:
        return before, before
    rows = [*planned, *([] if first is None else [first]), *new]
    provenance = tables.Provenance(stage="plan", name="", version=1, slice={}, inputs={})
    tables.write_rows(path, Planned, rows, provenance)
    return before, rows[-1].shard + 1 if rows else 0


def find_new_pieces(
    planned: Iterable[Planned], pieces: Iterable[Piece], *, place: Callable[[str], str]
) -> Iterator[Piece]:
    """The pieces that are not planned yet: new files, and the ends of files that grew."""
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
    """Fills shards from number `first` with `shard_size` samples each, splitting pieces where a shard is full."""
    shard, room = first, shard_size
    for piece in pieces:
        if piece.stop is None:
            shard, room = (shard if room == shard_size else shard + 1), 0
            yield _plan_piece(shard, piece, piece.start, None)
            continue
        start = piece.start
        while start < piece.stop:
            if room == 0:
                shard, room = shard + 1, shard_size
            stop = min(piece.stop, start + room)
            yield _plan_piece(shard, piece, start, stop)
            start, room = stop, room - (stop - start)


def _plan_piece(shard: int, piece: Piece, start: int, stop: int | None) -> Planned:
    if shard >= MAX_SHARDS:
        raise UserError(f"the corpus needs more than {MAX_SHARDS} shards; raise source.shard_size")
    return Planned(shard=shard, file=piece.file, start=start, stop=stop, num_bytes=piece.num_bytes)


def count_shards(path: Path) -> int:
    """The number of planned shards, from the file's footer."""
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
        SpecError: it does not parse, or names a shard that is not planned.
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
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([1-9][0-9]*))?)?", part)
        if not match:
            raise SpecError(f"--shard {spec}: {part!r} is none of 7, 0-9, 0-99:10, i/n, all, or a list of those")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or last >= num_shards:
            raise SpecError(f"--shard {spec}: {part} is not within the plan's shards, 0-{num_shards - 1}")
        shards.update(range(first, last + 1, step))
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
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
