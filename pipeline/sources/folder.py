"""Decides what a folder of images holds: which files are inputs, and which only say something about another.

An input is any file that is no side-car of an image, no metadata file and not hidden; whether it is an image is
found out by whoever decodes it. One file is one piece, so that a file which comes later moves no other.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.errors import BrokenParquetError, ConfigError, UnusableFileError
from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common, _files, _parquet

if TYPE_CHECKING:
    import pyarrow as pa

SIDECARS = (*_common.TEXTS, "json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` calls them in an imagefolder
FILE_NAME = "file_name"  # their column with the image's path, relative to the metadata file
NUM_ROWS = 10_000  # of a metadata file, made into columns at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = key(help="the folder with the images, and with their .txt or .json files", stamp=False, locate="path")
    alt_text: str = key("", _common.ALT_TEXT_HELP)


def claims(path: str) -> bool:
    """True for a directory. The least specific claim: `recap init` asks this source last."""
    return Path(path).is_dir()


def pieces(config: Config) -> Iterator[Piece]:
    """Every input, folder by folder, by name.

    Raises:
        ConfigError: there is no such folder, a metadata file has no `file_name`, or none has the column of alt text.
    """
    root = _files.folder(config.path)
    columns: set[str] = set()
    for folder, names in _walk(str(root)):
        for name in METADATA:
            if name in names:
                columns.update(_named(root / folder / name))
        yield from (Piece(file=_printable(folder + name), stop=1) for name in _inputs(names))
    if config.alt_text and columns and config.alt_text not in columns:
        message = f"no metadata file has a column {config.alt_text!r}; they have {', '.join(sorted(columns))}"
        raise ConfigError("source.alt_text", message)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The one file of the piece, with what its side-cars and the nearest metadata file say of it."""
    if piece.start > 0 or piece.stop == 0:
        return
    path = f"{config.path}/{_on_disk(piece.file)}"
    raw = Raw(source_key=piece.file, data=None)
    if _common.is_image(piece.file):
        raw = _described(raw, path, config)
    try:
        yield replace(raw, data=_files.inside(path, config.path, most=_common.MAX_IMAGE_BYTES))
    except UnusableFileError as error:
        yield replace(raw, error=str(error))


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root`, its name ending in "/", with the sorted names of its files; the hidden are left out."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.name[0] != ".":
                    (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
        yield folder, sorted(files)
        waiting += [f"{folder}{name}/" for name in sorted(folders, reverse=True)]


def _inputs(names: list[str]) -> Iterator[str]:
    images = {one for name in names if _common.is_image(name) for one in (name, name.rpartition(".")[0])}
    for name in names:
        sidecar = _common.extension(name) in SIDECARS and name.rpartition(".")[0] in images
        if not sidecar and name not in METADATA:
            yield name


def _printable(name: str) -> str:
    r"""A file's name as UTF-8, which Linux does not ask for: other bytes are written \xNN, and a real \xNN \x5cxNN."""
    name = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _on_disk(name: str) -> str:
    """The inverse of `_printable`."""
    plain = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), name.encode())
    return os.fsdecode(plain)


def _described(raw: Raw, path: str, config: Config) -> Raw:
    texts, fields = {}, _row(config.path, raw.source_key)
    for stem in (path.rpartition(".")[0], path):
        for ending in SIDECARS:
            data = _sidecar(f"{stem}.{ending}", config.path)
            if data is not None and ending == "json":
                fields |= _common.from_json(data)
            elif data is not None:
                texts[ending] = _common.text(data)
    return _common.describe(raw, fields, texts=texts, column=config.alt_text)


def _sidecar(path: str, root: str) -> bytes | None:
    try:
        return _files.inside(path, root, most=_common.MAX_TEXT_BYTES) if os.path.lexists(path) else None
    except UnusableFileError:
        return None


def _row(root: str, name: str) -> dict[str, Any]:
    """What the nearest metadata file that knows the image says of it."""
    image = PurePosixPath(name)
    for folder in image.parents:
        for metadata in METADATA:
            path = Path(root, _on_disk(str(folder)), metadata)
            if path.is_file():
                about = path.stat()
                row = _table(path, about.st_mtime_ns, about.st_size).row(str(image.relative_to(folder)))
                if row is not None:
                    return row
    return {}


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A metadata file as two columns of text: about as large in memory as it is on disk, whatever its format."""

    names: pa.Array  # sorted
    rows: pa.Array  # JSON

    def row(self, name: str) -> dict[str, Any] | None:
        found = bisect_left(range(len(self.names)), name, key=lambda index: self.names[index].as_py())
        if found == len(self.names) or self.names[found].as_py() != name:
            return None
        row: dict[str, Any] = json.loads(self.rows[found].as_py())
        return row


@lru_cache(maxsize=8)
def _table(path: Path, modified: int, size: int) -> _Table:  # noqa: ARG001
    """Args: modified, size: they tell one state of the file from another."""
    import pyarrow as pa

    schema = pa.schema([("names", pa.large_string()), ("rows", pa.large_string())])
    chunks, rows = [schema.empty_table()], _rows(path)
    while batch := list(islice(rows, NUM_ROWS)):
        names = [os.path.normpath(_common.clean(row.pop(FILE_NAME))) for row in batch]
        chunks.append(pa.table([names, [_common.to_json(row) for row in batch]], schema))
    table = pa.concat_tables(chunks).sort_by("names")
    return _Table(names=table["names"].combine_chunks(), rows=table["rows"].combine_chunks())


def _named(path: Path) -> Collection[str]:
    """The columns of a metadata file; those of a .jsonl are its first row's.

    Raises:
        ConfigError: the image's name is not among them.
    """
    with path.open("rb") as stream:
        columns = {".csv": _csv_columns, ".jsonl": _jsonl_columns, ".parquet": _parquet_columns}[path.suffix](stream)
    if FILE_NAME not in columns:
        raise ConfigError(str(path), f"has no column {FILE_NAME!r}, only {', '.join(columns) or 'what cannot be read'}")
    return columns


def _csv_columns(stream: BinaryIO) -> Collection[str]:
    return next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")), [])


def _jsonl_columns(stream: BinaryIO) -> Collection[str]:
    return _common.from_json(next(iter(stream), b"{}")).keys()


def _parquet_columns(stream: BinaryIO) -> Collection[str]:
    try:
        names: list[str] = _parquet.table(stream).schema_arrow.names
    except BrokenParquetError:
        return []
    return names


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix]
    return (row for row in read(path) if isinstance(row.get(FILE_NAME), str))


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_common.MAX_TEXT_BYTES)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines, restkey=""):
            yield dict(row)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        yield from map(_common.from_json, lines)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        table = _parquet.table(stream)
        for group, _ in _parquet.groups(table):
            for batch in _parquet.batches(table, table.schema_arrow.names, group=group):
                yield from _columns.values(batch)
