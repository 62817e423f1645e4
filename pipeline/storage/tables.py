"""Decides how rows lie on disk: typed Parquet files that are whole when they are in place, each with its stamp.

It knows records and files. It does not know which rows a table ought to have, or why.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from pipeline.errors import BrokenTableError
from pipeline.records import Record, arrow_schema, column_names

if TYPE_CHECKING:
    import pyarrow as pa

R = TypeVar("R", bound=Record)
T = TypeVar("T")
TAIL = 1 << 16  # bytes read from the end of a table: its footer in all but the largest
ROWS_PER_GROUP = 2_000  # rows are held in memory by the group, when written and when read
STAMP = "recap.stamp"
STAMP_KEY = b"\x18" + bytes([len(STAMP)]) + STAMP.encode() + b"\x18"  # as a footer has it, up to the value's length
MAGIC = b"PAR1"
HEAD_BYTES = 28  # of a stamp: {"check":"0123456789abcdef",


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """All that decides the rows of a table file. Two equal recipes have one fingerprint."""

    stage: str
    name: str
    version: int  # of the stage
    slice: Mapping[str, Any]  # JSON values: the part of run.toml, recipe and rubric that decides
    inputs: Mapping[str, str]  # folder of a table that was read -> its content digest

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json_of(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TableFooter:
    """What a table file says of itself, in its footer."""

    recipe: Provenance
    digest: str  # of the rows, hex
    num_rows: int
    statuses: Mapping[str, int] = field(default_factory=dict)  # status -> rows; {} where rows have none
    payload: Mapping[str, int] = field(default_factory=dict)  # file beside the table, within the run -> bytes

    @property
    def fingerprint(self) -> str:
        return self.recipe.fingerprint


def read_stamp(path: Path) -> TableFooter | None:
    """The stamp of a table file, from its footer alone; None when there is no file.

    Raises:
        BrokenTableError: the file is cut short, no table of ours, or its stamp has been damaged.
    """
    try:
        values = json.loads(stamp_text(path))
    except FileNotFoundError:
        return None
    del values["check"]
    return TableFooter(**{**values, "recipe": Provenance(**values["recipe"])})


def stamp_text(path: Path) -> bytes:
    """The stamp of a table file as JSON, checked: keys in order, no white space, "check" the first.

    Raises:
        FileNotFoundError: there is no file.
        BrokenTableError: the file is cut short, no table of ours, or its stamp has been damaged.
    """
    try:
        text = _found_stamp(path)
    except IndexError as error:
        raise BrokenTableError(path, "has a damaged stamp") from error
    rest = text[HEAD_BYTES:]
    if text[:HEAD_BYTES] != _head(b"{" + rest):
        raise BrokenTableError(path, "has a damaged stamp")
    return text


def _found_stamp(path: Path) -> bytes:
    """The stamp's JSON, found in the footer's bytes: parsing all of a footer takes ten times as long.

    A Parquet file ends with its footer, the footer's length and the magic. The footer, in Thrift's compact protocol,
    has key and value as strings, each with its length before it, after all that comes from the data.
    """
    with open(path, "rb", buffering=0) as file:
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
    found = tail.rfind(STAMP_KEY, len(tail) - length)
    if found < 0:
        raise BrokenTableError(path, "carries no stamp: recap did not write it")
    num, start = _varint(tail, found + len(STAMP_KEY))
    return tail[start : start + num]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in Thrift's compact protocol, and where what follows it begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def check_of(values: Mapping[str, Any]) -> str:
    return _check(json_of(values).encode())


def _check(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _head(rest: bytes) -> bytes:
    """How a stamp begins: with what guards the rest of it."""
    return f'{{"check":"{_check(rest)}",'.encode()


def whole_stamp(path: Path) -> TableFooter | None:
    """The stamp of a table file; None when there is no file, or none that is whole."""
    try:
        return read_stamp(path)
    except BrokenTableError:
        return None


def write(path: Path, record: type[R], rows: Iterable[R], recipe: Provenance, *, durable: bool = True) -> TableFooter:
    """Writes a whole table at once; see `Writer` and `atomic`."""
    with atomic(path, durable=durable) as file, Writer(file, record, recipe) as writer:
        for row in rows:
            writer.add(row)
    return writer.stamp


def read(path: Path, record: type[R]) -> Iterator[R]:
    """The rows of a table file in order, a row group in memory at a time.

    Raises:
        BrokenTableError: the file does not read as a table of `record`, or has changed since it was written.
    """
    for batch in batches(path, record):
        yield from from_arrow(record, batch)


def batches(path: Path, record: type[Record]) -> Iterator[pa.RecordBatch]:
    """The same as Arrow has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stamp, num_rows = read_stamp(path), 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=list(column_names(record))):
                num_rows += len(batch)
                yield batch.select(list(column_names(record)))
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise BrokenTableError(path, f"does not read as a {record.table} table ({error})") from error
    except OSError as error:
        if error.errno is not None:  # the machine's: too many open files, no permission
            raise
        raise BrokenTableError(path, f"does not read as a {record.table} table ({error})") from error
    if stamp is not None and num_rows != stamp.num_rows:
        raise BrokenTableError(path, f"has {num_rows} rows and was written with {stamp.num_rows}")


def check(path: Path, record: type[Record]) -> None:
    """Reads a whole table for its checksums' sake: DuckDB, which stages read with too, does not look at them.

    Raises:
        BrokenTableError: the file has changed since it was written.
    """
    for _ in batches(path, record):
        pass


class Writer:
    """Writes rows to an open Parquet file in fixed row groups, so that equal rows give equal bytes."""

    stamp: TableFooter  # once it is closed
    payload: Mapping[str, int]  # what the stamp will say of the files beside the table

    def __init__(self, file: IO[bytes], record: type[Record], recipe: Provenance) -> None:
        import pyarrow.parquet as pq

        self._parquet = pq.ParquetWriter(file, arrow_schema(record), compression="zstd", write_page_checksum=True)
        self._record, self._recipe = record, recipe
        self._rows: list[Record] = []
        self._digest = hashlib.sha256()
        self.num_rows = 0
        self._statuses: Counter[str] = Counter()
        self.payload = {}

    def add(self, row: Record) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        batch = to_arrow(self._record, self._rows)
        self._digest.update(batch.serialize())
        self._parquet.write_batch(batch, row_group_size=ROWS_PER_GROUP)
        if "status" in column_names(self._record):
            self._statuses.update(batch.column("status").to_pylist())
        self._rows = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            if self._rows:
                self._flush()
            self.stamp = TableFooter(
                recipe=self._recipe,
                digest=self._digest.hexdigest(),
                num_rows=self.num_rows,
                statuses=dict(sorted(self._statuses.items())),
                payload=self.payload,
            )
            values = asdict(self.stamp)
            self._parquet.add_key_value_metadata({STAMP: json_of({**values, "check": check_of(values)})})
        self._parquet.close()


def to_arrow(record: type[R], rows: list[R]) -> pa.RecordBatch:
    """Rows as one batch of the record's schema."""
    import pyarrow as pa

    arrays = [
        pa.array([_plain(getattr(row, column.name)) for row in rows], type=column.type)
        for column in arrow_schema(record)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(record))


def from_arrow(record: type[R], batch: pa.RecordBatch) -> Iterator[R]:
    """The rows of a batch whose columns are the record's."""
    builders = _builders(record)
    for row in batch.to_pylist():
        for name, build in builders.items():
            row[name] = build(row[name])
        yield record(**row)


@contextmanager
def atomic(path: Path, *, work: Path | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole and on disk, or not at all.

    Args:
        path: the final name.
        work: the folder for the unfinished file, on the same file system; beside `path` by default.
        durable: whether it must survive a power cut; without, it survives the end of this process.
    """
    work = path.parent if work is None else work
    for folder in {path.parent, work}:
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = work / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:  # a Ctrl-C too leaves no litter; raised again
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Runs of `size` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def json_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [vars(one) if is_dataclass(one) else one for one in value]
    return value


def _builders(record: type) -> dict[str, Callable[[Any], Any]]:
    """How to make a field from Arrow's value of it, for the fields where the two differ."""
    builders: dict[str, Callable[[Any], Any]] = {}
    for name, hint in get_type_hints(record).items():
        if get_origin(hint) is tuple:
            (inner, *_) = get_args(hint)
            builders[name] = _structs(inner) if is_dataclass(inner) else tuple
    return builders


def _structs(inner: Any) -> Callable[[Any], Any]:
    return lambda values: tuple(inner(**value) for value in values)
