"""The plan: which shard holds which pieces of the corpus, frozen once; growth only appends shards.

Everything else trusts the plan, so it is verified when it is read: pages by their checksums, and the Parquet footer,
which locates the pages, by a checksum of its own. Plans of earlier versions lack the latter and remain readable.

Also the notation of sets of shards, as --shard takes it. Only sources know what a sample is.
"""

from __future__ import annotations

import hashlib
import io
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
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import machine
from pipeline.errors import BrokenTableError, MachineError, RefusedError, SpecError, UserError
from pipeline.records import Piece, Planned, arrow_schema
from pipeline.storage import tables
from pipeline.storage.disk import make_folder
from pipeline.storage.lock import hold_lock

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

T = TypeVar("T")
MAX_SHARDS = 1_000_000  # six digits in the key
CHECKSUM_KEY = "recap.footer"  # of the Parquet footer's checksum, within that footer
ZEROS = b"0" * 64  # in the checksum's place while it is computed
ENCODED_KEY = b"\x18" + bytes([len(CHECKSUM_KEY)]) + CHECKSUM_KEY.encode() + b"\x18" + bytes([len(ZEROS)])  # in Thrift


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
            MachineError: the plan is damaged.
        """

        def load_selected(file: pq.ParquetFile) -> tuple[Plan, Sequence[int]]:
            num_shards = _count_shards(file)
            selected = parse_spec(shards, num_shards)
            first, last = (selected[0], selected[-1]) if selected else (0, -1)
            spans = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
            groups = [i for i, span in enumerate(spans) if span.max >= first and span.min <= last]
            return cls(num_shards=num_shards, rows=file.read_row_groups(groups)), selected

        return _read_plan(path, load_selected)

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

    Raises:
        MachineError: the plan is damaged, or another process replaced it at the same time.
        RefusedError: another process does not release the plan, or there is nothing new for a changed `shard_size`.
    """
    corpus = list(pieces)  # before the lock is taken: listing may take hours
    make_folder(path.parent)
    with hold_lock(path.with_name(f".{path.name}.lock")) as is_held:
        planned = _read_planned(path)
        before = planned[-1].shard + 1 if planned else 0
        new = list(assign_shards(find_new_pieces(planned, corpus, place=place), shard_size=shard_size, first=before))
        if not new and planned:
            if changed := explain_shard_size(path, shard_size):
                raise RefusedError(changed)
            return before, before
        rows = [*planned, *new]
        content = _format_plan(rows, shard_size=shard_size)
        with tables.open_atomic(path) as file:
            file.write(content)
            if not is_held():  # this process was suspended for so long that another took the lock
                raise MachineError(f"{path} was extended by another process meanwhile; run the command again")
    return before, rows[-1].shard + 1 if rows else 0


def _read_planned(path: Path) -> list[Planned]:
    try:
        return _read_plan(path, _list_rows)
    except FileNotFoundError:
        return []


def explain_shard_size(path: Path, shard_size: int) -> str:
    """The reason this `source.shard_size` has no effect on the plan; "" if it is the last extension's, or unknown."""
    footer = tables.read_footer(path)
    planned = footer.provenance.slice.get("shard_size") if footer else None
    if planned in (None, shard_size):
        return ""
    return (
        f"source.shard_size = {shard_size} has no effect: {path} was made with {planned}, and planned shards never"
        f" change; set it back to {planned}. Once the corpus has new images, `recap plan` uses the new size for them."
        f" For a new plan, with which all tables are made again: rm {path} and `recap plan`"
    )


def find_lost_files(path: Path, pieces: Iterable[Piece], *, place: Callable[[str], str] = str) -> dict[str, int]:
    """The planned files that are not among the pieces of the corpus any more, each with its first shard."""
    present = {place(piece.file) for piece in pieces}
    lost: dict[str, int] = {}
    for row in _read_planned(path):
        if place(row.file) not in present:
            lost.setdefault(row.file, row.shard)
    return lost


def _format_plan(rows: Iterable[Planned], *, shard_size: int) -> bytes:
    """The plan as a file, with the checksum of its Parquet footer."""
    made_with = {"shard_size": shard_size}
    provenance = tables.Provenance(stage="plan", name="", version=1, slice=made_with, inputs={})
    out = io.BytesIO()
    with tables.TableWriter(out, Planned, provenance) as writer:
        for row in rows:
            writer.add(row)
        writer.add_metadata({CHECKSUM_KEY: ZEROS.decode()})
    content = out.getvalue()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.rindex(ENCODED_KEY) + len(ENCODED_KEY)
    checksum = hashlib.sha256(content[start:]).hexdigest().encode()
    return content[:at] + checksum + content[at + len(ZEROS) :]


def _list_rows(file: pq.ParquetFile) -> list[Planned]:
    return [Planned(**row) for batch in file.iter_batches() for row in batch.to_pylist()]


def _read_plan(path: Path, read: Callable[[pq.ParquetFile], T]) -> T:
    """The result of `read`.

    Raises:
        FileNotFoundError: there is no plan.
        MachineError: it is damaged, or what is read of it is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read_once() -> T:
        verify_plan_footer(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.names != arrow_schema(Planned).names:
                raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
            return read(file)

    try:
        return read_once()
    except UserError:
        raise
    except (pa.ArrowException, BrokenTableError, OSError, TypeError, ValueError, IndexError, AttributeError) as error:
        machine.rule_out(error, read_once)
        raise MachineError(
            f"{path} is damaged ({error}); restore it from a backup. Without one, and only if the corpus has neither"
            " changed nor grown since, move the file away and run `recap plan`: it writes the same plan again"
        ) from error


def verify_plan_footer(path: Path) -> None:
    """Verifies the Parquet footer, where it has a checksum, and ours within it.

    Raises:
        FileNotFoundError: there is no file.
        ValueError, BrokenTableError: it is damaged.
    """
    tables.read_footer_text(path)
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(size - 8)
        file.seek(size - 8 - int.from_bytes(file.read(4), "little"))
        footer = file.read()
    at = footer.rfind(ENCODED_KEY) + len(ENCODED_KEY)
    if at < len(ENCODED_KEY):
        return
    blank = footer[:at] + ZEROS + footer[at + len(ZEROS) :]
    if hashlib.sha256(blank).hexdigest().encode() != footer[at : at + len(ZEROS)]:
        raise ValueError("its footer has changed since it was written")


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
        raise UserError(f"source.shard_size: the corpus needs more than {MAX_SHARDS:,} shards of this size; raise it")
    return Planned(shard=shard, file=piece.file, start=start, stop=stop, num_bytes=piece.num_bytes)


def count_shards(path: Path) -> int:
    """The number of planned shards, from the file's footer."""
    return _read_plan(path, _count_shards)


def _count_shards(file: pq.ParquetFile) -> int:
    groups = file.num_row_groups
    if groups == 0 or file.metadata.num_rows == 0:
        return 0
    last: int = file.metadata.row_group(groups - 1).column(0).statistics.max
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
