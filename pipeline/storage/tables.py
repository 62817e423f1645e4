"""Parquet tables with provenance footers: a file in place is complete.

This module knows records and files. Which rows a table should have, and why, is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from pipeline import machine
from pipeline.errors import BrokenTableError
from pipeline.records import Record, arrow_schema, column_names
from pipeline.storage.disk import make_folder, sync_path
from pipeline.storage.layout import sweep_unfinished, unfinished_path

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

R = TypeVar("R", bound=Record)
T = TypeVar("T")
TAIL = 1 << 16  # bytes read from the end of a file: the whole Parquet footer of all but the largest tables
ROWS_PER_GROUP = 2_000  # rows in memory at a time, when written and when read
FOOTER_KEY = "recap.stamp"  # of our footer among the Parquet file's metadata
# The key as Thrift encodes it within a Parquet footer, up to the length of the value.
ENCODED_KEY = b"\x18" + bytes([len(FOOTER_KEY)]) + FOOTER_KEY.encode() + b"\x18"
MAGIC = b"PAR1"
HEAD_BYTES = 28  # of our footer: {"check":"0123456789abcdef",


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that decides the rows of a table file. Equal provenance gives equal fingerprints."""

    stage: str
    name: str
    version: int  # of the stage
    slice: Mapping[str, Any]  # JSON values: the part of run.toml, recipe and rubric that decides rows
    inputs: Mapping[str, str]  # folder of a table that was read -> its content digest

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TableFooter:
    """Provenance and contents of a table file, stored in its Parquet footer."""

    provenance: Provenance
    digest: str  # of the rows, hex
    num_rows: int
    statuses: Mapping[str, int] = field(default_factory=dict)  # status -> rows; {} where rows have none
    payload: Mapping[str, int] = field(default_factory=dict)  # payload file, relative to the run -> bytes
    payload_sha256: Mapping[str, str] = field(default_factory=dict)  # payload file -> hex; {} in older tables

    @property
    def fingerprint(self) -> str:
        return self.provenance.fingerprint

    @property
    def values(self) -> dict[str, Any]:
        """The JSON object that is stored, without its checksum."""
        values = asdict(self)
        values["recipe"] = values.pop("provenance")
        if not self.payload_sha256:
            del values["payload_sha256"]
        return values


def read_footer(path: Path) -> TableFooter | None:
    """The footer of a table file, without reading its rows; None when there is no file.

    Raises:
        BrokenTableError: the file is truncated, was not written by recap, or its footer is damaged.
    """
    try:
        values = json.loads(read_footer_text(path))
    except FileNotFoundError:
        return None
    del values["check"]
    provenance = Provenance(**values.pop("recipe"))
    return TableFooter(provenance=provenance, **values)


def read_footer_text(path: Path) -> bytes:
    """The footer as JSON, verified: keys sorted, no white space, "check" first.

    Raises:
        FileNotFoundError: there is no file.
        BrokenTableError: as `read_footer`.
    """
    try:
        text = _find_footer_text(path)
    except IndexError as error:
        raise BrokenTableError(path, "has a damaged footer") from error
    rest = text[HEAD_BYTES:]
    if text[:HEAD_BYTES] != f'{{"check":"{_compute_check(b"{" + rest)}",'.encode():
        raise BrokenTableError(path, "has a damaged footer")
    return text


def _find_footer_text(path: Path) -> bytes:
    """Finds our JSON among the Parquet footer's bytes: parsing the whole Parquet footer takes ten times as long.

    A Parquet file ends with its footer, the footer's length and the magic bytes. The footer uses Thrift's compact
    protocol: key and value are strings, each preceded by its length, and come after everything that depends on data.
    """
    with _open_table(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        tail = file.read(TAIL)
        if len(tail) < 12 or tail[-4:] != MAGIC:
            raise BrokenTableError(path, "is not a whole Parquet file")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size:
            raise BrokenTableError(path, "is not a whole Parquet file")
        if length > len(tail):
            file.seek(size - length)
            tail = file.read(length)
    at = tail.rfind(ENCODED_KEY, len(tail) - length)
    if at < 0:
        raise BrokenTableError(path, "has no recap footer: recap did not write it")
    num_bytes, start = _decode_varint(tail, at + len(ENCODED_KEY))
    return tail[start : start + num_bytes]


def _open_table(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise BrokenTableError(path, f"cannot be opened: {error.strerror}") from error


def _decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in Thrift's compact protocol, and the offset of the byte after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _compute_check(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def read_whole_footer(path: Path) -> TableFooter | None:
    """The footer of a table file; None when there is no file, or a damaged one."""
    try:
        return read_footer(path)
    except BrokenTableError:
        return None


def write_rows(
    path: Path,
    record: type[R],
    rows: Iterable[R],
    provenance: Provenance,
    *,
    work: Path | None = None,
    durable: bool = True,
) -> TableFooter:
    """Writes a whole table; see `TableWriter` and `open_atomic`."""
    with open_atomic(path, work=work, durable=durable) as file, TableWriter(file, record, provenance) as writer:
        for row in rows:
            writer.add(row)
    return writer.footer


def read_rows(path: Path, record: type[R]) -> Iterator[R]:
    """The rows of a table file in order, one row group in memory at a time.

    Raises:
        BrokenTableError: the file cannot be read as a table of `record`, or has changed since it was written.
    """
    for batch in read_batches(path, record):
        yield from from_arrow(record, batch)


def read_batches(path: Path, record: type[Record], *, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """As `read_rows`, in Arrow batches, with only these columns if they are given.

    Columns that the version of the file lacks have their defaults.
    """
    import pyarrow as pa

    footer, num_rows = read_footer(path), 0
    names = list(column_names(record) if columns is None else columns)
    try:
        for batch in _iterate_batches(path, record, names):
            num_rows += len(batch)
            yield batch
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        machine.rule_out(error, lambda: deque(_iterate_batches(path, record, names), maxlen=0))
        raise BrokenTableError(path, f"cannot be read as a table of {record.table} rows ({error})") from error
    if footer is not None and num_rows != footer.num_rows:
        raise BrokenTableError(path, f"has {num_rows} rows; it was written with {footer.num_rows}")


def _iterate_batches(path: Path, record: type[Record], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        known = arrow_schema(record, version=read_version(file.schema_arrow, record)).names
        stored = [name for name in known if name in names]
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=stored):
            yield _add_defaults(batch.select(stored), record, names)


def read_version(schema: pa.Schema, record: type[Record]) -> int:
    """The version of a table's columns, at most the record's; a column's default is read where it is earlier."""
    stored = (schema.metadata or {}).get(b"recap.version", b"").decode(errors="replace")
    return min(int(stored), record.version) if stored.isdecimal() and int(stored) else record.version


def _add_defaults(batch: pa.RecordBatch, record: type[Record], names: Sequence[str]) -> pa.RecordBatch:
    """The batch with these columns of the record, in this order."""
    import pyarrow as pa

    if batch.schema.names == [*names]:
        return batch
    schema, columns = arrow_schema(record), dict(zip(batch.schema.names, batch.columns, strict=True))
    defaults = {f.name: f.default for f in dataclasses.fields(cast(Any, record))}
    for name in names:
        if name not in columns:
            columns[name] = pa.array([_convert_structs(defaults[name])] * len(batch), type=schema.field(name).type)
    return pa.RecordBatch.from_arrays([columns[name] for name in names], [*names])


def verify_checksums(path: Path, record: type[Record]) -> None:
    """Reads a whole table to verify its page checksums, which DuckDB, with which stages read too, ignores.

    Raises:
        BrokenTableError: the file has changed since it was written.
    """
    for _ in read_batches(path, record):
        pass


def open_parquet(file: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


class TableWriter:
    """Writes rows to an open Parquet file in fixed row groups, so that equal rows give equal bytes."""

    footer: TableFooter  # once closed
    payload: Mapping[str, int]  # files beside the table, for its footer
    payload_sha256: Mapping[str, str]

    def __init__(self, file: IO[bytes], record: type[Record], provenance: Provenance) -> None:
        self._parquet = open_parquet(file, arrow_schema(record))
        self._record, self._provenance = record, provenance
        self._rows: list[Record] = []
        self._digest = hashlib.sha256()
        self.num_rows = 0
        self._statuses: Counter[str] = Counter()
        self.payload, self.payload_sha256 = {}, {}

    def add(self, row: Record) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._write_group()

    def add_metadata(self, values: Mapping[str, str]) -> None:
        """Adds values to the Parquet footer, beside ours."""
        self._parquet.add_key_value_metadata(values)

    def _write_group(self) -> None:
        batch = to_arrow(self._record, self._rows)
        self._digest.update(encode_batch(batch))
        self._parquet.write_batch(batch, row_group_size=ROWS_PER_GROUP)
        if "status" in column_names(self._record):
            self._statuses.update(batch.column("status").to_pylist())
        self._rows = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            if self._rows:
                self._write_group()
            self.footer = TableFooter(
                provenance=self._provenance,
                digest=self._digest.hexdigest(),
                num_rows=self.num_rows,
                statuses=dict(sorted(self._statuses.items())),
                payload=self.payload,
                payload_sha256=self.payload_sha256,
            )
            self._parquet.add_key_value_metadata({FOOTER_KEY: format_footer(self.footer.values)})
        self._parquet.close()


def format_footer(values: Mapping[str, Any]) -> str:
    """A footer's values as stored: canonical JSON with a checksum of itself."""
    check = _compute_check(canonical_json(values).encode())
    return canonical_json({**values, "check": check})


def to_arrow(record: type[R], rows: list[R]) -> pa.RecordBatch:
    """Rows as one batch of the record's schema."""
    import pyarrow as pa

    arrays = [
        pa.array([_convert_structs(getattr(row, column.name)) for row in rows], type=column.type)
        for column in arrow_schema(record)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(record))


def encode_batch(batch: pa.RecordBatch) -> pa.Buffer | bytes:
    """The bytes of which a footer has the digest, batch by batch; none for a batch without rows."""
    return batch.serialize() if len(batch) else b""


def from_arrow(record: type[R], batch: pa.RecordBatch) -> Iterator[R]:
    """The rows of a batch whose columns are the record's."""
    builders = _find_builders(cast(Any, record))
    for row in batch.to_pylist():
        for name, build in builders.items():
            row[name] = build(row[name])
        yield record(**row)


@contextmanager
def open_atomic(path: Path, *, work: Path | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file that appears at `path` complete, or not at all.

    Args:
        path: the final name.
        work: folder for the unfinished file, on the same file system; by default the folder of `path`.
        durable: whether the file must survive a power failure, rather than only the end of this process.
    """
    with place_atomic(path, work=work, durable=durable) as unfinished, open(unfinished, "xb") as file:
        yield file


@contextmanager
def place_atomic(path: Path, *, work: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """As `open_atomic`, for a file that something else writes: yields the name to write it under."""
    is_beside = work is None
    work = path.parent if work is None else work
    for folder in {path.parent, work}:
        make_folder(folder)
    if is_beside:  # otherwise the owner of `work` sweeps it
        sweep_unfinished(work)
    unfinished = unfinished_path(path, work=work)
    with ExitStack() as undo:
        undo.callback(unfinished.unlink, missing_ok=True)
        yield unfinished
        if durable:
            sync_path(unfinished)
        os.replace(unfinished, path)
        undo.pop_all()
    if durable:
        sync_path(path.parent)


def split_batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows; the last may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _convert_structs(value: Any) -> Any:
    if isinstance(value, tuple):
        return [vars(one) if is_dataclass(one) else one for one in value]
    return value


@cache
def _find_builders(record: Any) -> dict[str, Callable[[Any], Any]]:
    """Functions that convert Arrow values to fields, for the fields where the two differ."""
    builders: dict[str, Callable[[Any], Any]] = {}
    for name, hint in get_type_hints(record).items():
        if get_origin(hint) is tuple:
            (inner, *_) = get_args(hint)
            builders[name] = _structs(inner) if is_dataclass(inner) else tuple
    return builders


def _structs(inner: Any) -> Callable[[Any], Any]:
    return lambda values: tuple(inner(**value) for value in values)
