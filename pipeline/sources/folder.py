"""Directories of image files: which files are inputs, and which only describe another.

Every file is an input, except sidecars of an image, metadata files and hidden files; whether it is an image is left to
the decoder. One file is one piece, so that a later file moves no other.
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
from pipeline.sources import _common, _files, _parquet

if TYPE_CHECKING:
    import pyarrow as pa

SIDECARS = (*_common.TEXTS, "json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` calls them in an imagefolder
FILE_NAME = "file_name"  # their column with the image's path, relative to the metadata file
NUM_ROWS = 10_000  # of a metadata file, converted to columns at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = key(help="the folder with the images, and with their .txt or .json files", stamp=False, locate="path")
    alt_text: str = key("", _common.ALT_TEXT_HELP)


def claims(path: str) -> bool:
    """True for a directory. The least specific claim: `recap init` asks this source last."""
    return Path(path).is_dir()


def pieces(config: Config) -> Iterator[Piece]:
    """Every input, directory by directory, by name.

    Raises:
        ConfigError: there is no such directory, a metadata file has no `file_name`, or none has the alt text's column.
    """
    root = _files.check_directory(config.path)
    columns: set[str] = set()
    for folder, names in _walk_folders(str(root)):
        for name in METADATA:
            if name in names:
                columns.update(_read_columns(root / folder / name))
        yield from (Piece(file=_escape_name(folder + name), stop=1) for name in _list_inputs(names))
    if config.alt_text and columns and config.alt_text not in columns:
        message = f"no metadata file has a column {config.alt_text!r}; they have {', '.join(sorted(columns))}"
        raise ConfigError("source.alt_text", message)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The one file of the piece, described by its sidecars and the nearest metadata file."""
    if piece.start > 0 or piece.stop == 0:
        return
    path = f"{config.path}/{_unescape_name(piece.file)}"
    raw = Raw(source_key=piece.file, data=None)
    if _common.is_image(piece.file):
        raw = _add_text(raw, path, config)
    try:
        yield replace(raw, data=_files.read_inside(path, config.path, limit=_common.MAX_IMAGE_BYTES))
    except UnusableFileError as error:
        yield replace(raw, error=str(error))


def _walk_folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each directory below `root`, its name ending in "/", with its sorted file names; hidden ones are skipped."""
    pending = [""]
    while pending:
        folder = pending.pop()
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.name[0] != ".":
                    (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
        yield folder, sorted(files)
        pending += [f"{folder}{name}/" for name in sorted(folders, reverse=True)]


def _list_inputs(names: list[str]) -> Iterator[str]:
    images = {one for name in names if _common.is_image(name) for one in (name, name.rpartition(".")[0])}
    for name in names:
        is_sidecar = _common.parse_extension(name) in SIDECARS and name.rpartition(".")[0] in images
        if not is_sidecar and name not in METADATA:
            yield name


def _escape_name(name: str) -> str:
    r"""A file's name as UTF-8, which Linux does not require: other bytes become \xNN, and a literal \xNN \x5cxNN."""
    name = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _unescape_name(name: str) -> str:
    """The inverse of `_escape_name`."""
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), name.encode())
    return os.fsdecode(data)


def _add_text(raw: Raw, path: str, config: Config) -> Raw:
    texts, fields = {}, _find_row(config.path, raw.source_key)
    for stem in (path.rpartition(".")[0], path):
        for ending in SIDECARS:
            data = _read_sidecar(f"{stem}.{ending}", config.path)
            if data is not None and ending == "json":
                fields |= _common.parse_json(data)
            elif data is not None:
                texts[ending] = _common.decode_text(data)
    return _common.add_text(raw, fields, texts=texts, column=config.alt_text)


def _read_sidecar(path: str, root: str) -> bytes | None:
    try:
        return _files.read_inside(path, root, limit=_common.MAX_TEXT_BYTES) if os.path.lexists(path) else None
    except UnusableFileError:
        return None


def _find_row(root: str, name: str) -> dict[str, Any]:
    """The image's row in the nearest metadata file that has one; empty when none has."""
    image = PurePosixPath(name)
    for folder in image.parents:
        for metadata in METADATA:
            path = Path(root, _unescape_name(str(folder)), metadata)
            if path.is_file():
                status = path.stat()
                row = _load_table(path, status.st_mtime_ns, status.st_size).find_row(str(image.relative_to(folder)))
                if row is not None:
                    return row
    return {}


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A metadata file as two columns of text: about as large in memory as on disk, in any format."""

    names: pa.Array  # sorted
    rows: pa.Array  # JSON

    def find_row(self, name: str) -> dict[str, Any] | None:
        index = bisect_left(range(len(self.names)), name, key=lambda index: self.names[index].as_py())
        if index == len(self.names) or self.names[index].as_py() != name:
            return None
        row: dict[str, Any] = json.loads(self.rows[index].as_py())
        return row


@lru_cache(maxsize=8)
def _load_table(path: Path, modified: int, size: int) -> _Table:  # noqa: ARG001
    """Args: modified, size: they make a changed file another cache entry."""
    import pyarrow as pa

    schema = pa.schema([("names", pa.large_string()), ("rows", pa.large_string())])
    chunks, rows = [schema.empty_table()], _read_rows(path)
    while batch := list(islice(rows, NUM_ROWS)):
        names = [os.path.normpath(_common.replace_surrogates(row.pop(FILE_NAME))) for row in batch]
        chunks.append(pa.table([names, [_common.format_json(row) for row in batch]], schema))
    table = pa.concat_tables(chunks).sort_by("names")
    return _Table(names=table["names"].combine_chunks(), rows=table["rows"].combine_chunks())


def _read_columns(path: Path) -> Collection[str]:
    """The columns of a metadata file; those of a .jsonl are its first row's.

    Raises:
        ConfigError: `file_name` is not among them.
    """
    read = {".csv": _read_csv_columns, ".jsonl": _read_jsonl_columns, ".parquet": _read_parquet_columns}[path.suffix]
    with path.open("rb") as stream:
        columns = read(stream)
    if FILE_NAME not in columns:
        others = f"it has {', '.join(columns)}" if columns else "no column can be read"
        raise ConfigError(str(path), f"has no column {FILE_NAME!r}; {others}")
    return columns


def _read_csv_columns(stream: BinaryIO) -> Collection[str]:
    return next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")), [])


def _read_jsonl_columns(stream: BinaryIO) -> Collection[str]:
    return _common.parse_json(next(iter(stream), b"{}")).keys()


def _read_parquet_columns(stream: BinaryIO) -> Collection[str]:
    try:
        names: list[str] = _parquet.open_table(stream).schema_arrow.names
    except BrokenParquetError:
        return []
    return names


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    read = {".csv": _read_csv_rows, ".jsonl": _read_jsonl_rows, ".parquet": _read_parquet_rows}[path.suffix]
    return (row for row in read(path) if isinstance(row.get(FILE_NAME), str))


def _read_csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_common.MAX_TEXT_BYTES)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines, restkey=""):
            yield dict(row)


def _read_jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        yield from map(_common.parse_json, lines)


def _read_parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        yield from _parquet.read_rows(stream)
