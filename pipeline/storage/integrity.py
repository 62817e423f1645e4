"""Verification of single files: every byte of a table, and payload files by their recorded sizes and digests.

It knows files and the rows they hold; which tables a run should have is known elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from pipeline import machine
from pipeline.errors import BrokenTableError
from pipeline.records import Planned, Record, arrow_schema
from pipeline.storage import tables
from pipeline.storage.payloads import hash_file, measure_file
from pipeline.storage.plan import CHECKSUM_KEY, verify_plan_footer

if TYPE_CHECKING:
    import pyarrow as pa
    from typing_extensions import Buffer

CREATOR = "parquet-cpp-arrow version "


def check_table(path: Path, record: type[Record], *, shard: int | None = None) -> tables.TableFooter:
    """Reads a whole table and returns its footer; the keys of its rows must be of `shard`, if it is given.

    Page checksums protect the rows alone. A Parquet file also has page headers, statistics and a schema, with which
    DuckDB decides what it reads; so the rows are written again, and the bytes must be equal. Another version of Arrow
    may write other bytes: the tables that it wrote are only verified by their checksums.

    Raises:
        FileNotFoundError: there is no such table.
        BrokenTableError: the file has changed since it was written.
    """
    import pyarrow as pa

    try:
        return _compare_table(path, record, shard)
    except (pa.ArrowException, ValueError, OSError) as error:  # of metadata that no reader of rows looks at
        machine.rule_out(error, lambda: _compare_table(path, record, shard))
        raise BrokenTableError(path, f"cannot be read as a table of {record.table} rows ({error})") from error


def _compare_table(path: Path, record: type[Record], shard: int | None) -> tables.TableFooter:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = tables.read_footer_text(path)
    stored_schema, foreign = pq.read_schema(path), ""
    record = _find_record(stored_schema, record)
    schema = arrow_schema(record, version=tables.read_version(stored_schema, record))
    has_keys = shard is not None and "key" in schema.names and "position" not in stored_schema.names  # not `Placed`
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        comparison = _Comparison(file)
        with tables.open_parquet(cast(IO[bytes], comparison), schema) as writer:
            for batch in tables.read_batches(path, record):
                batch = pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema)
                if has_keys and not foreign:
                    foreign = _find_foreign_key(batch, f"{shard:06d}")
                digest.update(tables.encode_batch(batch))
                writer.write_batch(batch, row_group_size=tables.ROWS_PER_GROUP)
            stored = pq.read_metadata(path).metadata or {}
            if checksum := stored.get(CHECKSUM_KEY.encode()):  # of the plan's Parquet footer
                writer.add_key_value_metadata({CHECKSUM_KEY: checksum})
            writer.add_key_value_metadata({tables.FOOTER_KEY: text})
        differs_at = comparison.finish()
    creator = str(pq.read_metadata(path).created_by)
    is_ours = creator == CREATOR + pa.cpp_version
    if differs_at is not None and (is_ours or not re.fullmatch(rf"{CREATOR}[0-9.]+", creator)):
        raise BrokenTableError(path, f"has changed since it was written: byte {differs_at:,} is not what it was")
    if foreign:
        raise BrokenTableError(path, f"has rows of another shard: {foreign} the first")
    footer = tables.read_footer(path)
    assert footer is not None, f"{path} was removed while it was read"
    # The digest is over Arrow's own encoding of the rows, which another version may lay out in another way: only
    # equal versions give equal rows equal digests.
    if is_ours and footer.digest != digest.hexdigest() and footer.digest != _compute_digest(path, record, schema):
        raise BrokenTableError(path, "has other rows than it was written with: their SHA-256 is not that in its footer")
    return footer


def _compute_digest(path: Path, record: type[Record], schema: pa.Schema) -> str:
    """The digest of the rows in new arrays, as their writer had them: those of a reader may have other null bitmaps."""
    import pyarrow as pa

    digest = hashlib.sha256()
    for batch in tables.read_batches(path, record):
        arrays = [pa.array(batch.column(field.name).to_pylist(), type=field.type) for field in schema]
        digest.update(tables.encode_batch(pa.RecordBatch.from_arrays(arrays, schema=schema)))
    return digest.hexdigest()


def _find_record(stored: pa.Schema, record: type[Record]) -> type[Record]:
    """The record of a table's columns: a stale table may have more of them, by an earlier configuration of its pass."""
    kinds = (kind for kind in record.__subclasses__() if kind.table == record.table)
    alike = (
        kind for kind in kinds if arrow_schema(kind, version=tables.read_version(stored, kind)).names == stored.names
    )
    return record if arrow_schema(record).names == stored.names else next(alike, record)


def _find_foreign_key(batch: pa.RecordBatch, prefix: str) -> str:
    """The first key that does not begin with its shard's number; "" if all do."""
    import pyarrow.compute as pc

    keys = batch.column("key")
    others = keys.filter(pc.invert(pc.starts_with(keys, pattern=prefix)))
    return str(others[0]) if len(others) else ""


def check_plan(path: Path) -> None:
    """As `check_table`, for the plan, whose Parquet footer has a checksum too.

    Raises:
        FileNotFoundError: there is no plan.
        BrokenTableError: it has changed since it was written.
    """
    check_table(path, Planned)
    try:
        verify_plan_footer(path)
    except ValueError as error:
        raise BrokenTableError(path, f"has changed since it was written: {error}") from error


class _Comparison(io.RawIOBase):
    """A file for writing that compares with another, and stores nothing."""

    def __init__(self, other: IO[bytes]) -> None:
        self._other, self._position = other, 0
        self._differs_at: int | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Buffer) -> int:
        written = bytes(data)
        expected = self._other.read(len(written))
        if self._differs_at is None and expected != written:
            pairs = zip(expected, written, strict=False)
            self._differs_at = self._position + next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected))
        self._position += len(written)
        return len(written)

    def finish(self) -> int | None:
        """The offset of the first byte that differs, also where one file is longer; None if they are equal."""
        if self._differs_at is None and self._other.read(1):
            return self._position
        return self._differs_at


def check_payload_file(run: Path, name: str, footer: tables.TableFooter) -> str:
    """Describes the damage of one payload file; "" if there is none."""
    path, num_bytes = run / name, footer.payload[name]
    size, problem = measure_file(path)
    if problem:
        return problem
    if size != num_bytes:
        return f"has {size:,} bytes; it was written with {num_bytes:,}"
    digest = footer.payload_sha256.get(name)
    return "has changed since it was written: its SHA-256 differs" if digest not in (None, hash_file(path)) else ""
