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
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from pipeline import progress
from pipeline.errors import BrokenParquetError, ConfigError, UnusableFileError
from pipeline.records import FileStatus, Piece, Raw, replace_surrogates
from pipeline.sections import key
from pipeline.sources import _common, _files, _parquet, _survey, _trees

if TYPE_CHECKING:
    import pyarrow as pa

SIDECARS = (*_common.TEXTS, "json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` calls them in an imagefolder
FILE_NAME = "file_name"  # their column with the image's path, relative to the metadata file
SIDECAR_ERROR = "sidecar_error"  # the metadata of an image with a sidecar that cannot be read
NUM_EXAMPLES = 3  # of lost metadata rows, in a message
NUM_ROWS = 10_000  # of a metadata file, converted to columns at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = key(help="the folder with the images, and with their .txt or .json files", stamp=False, locate="path")
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    follow_links: bool = key(
        False,
        "read files and folders wherever symbolic links lead; otherwise only those inside the folder",
        stamp_default=False,
    )
    exclude: tuple[str, ...] = key(
        (),
        'patterns of file names or paths that the plan leaves out, as in ["*.npz"]; what is planned stays, so to change'
        " it at the start remove plan.parquet and run `recap plan`",
        stamp=False,
    )


def claims(path: str) -> bool:
    """True for a directory. The least specific claim: `recap init` asks this source last."""
    return _survey.is_directory(path)


def pieces(config: Config) -> Iterator[Piece]:
    """Every input, directory by directory, by name.

    Raises:
        ConfigError: there is no such directory, a metadata file cannot be read or has no `file_name`, or none has the
            alt text's column.
    """
    _files.check_directory(config.path)
    tree = _open_tree(config)
    columns: set[str] = set()
    used: dict[str, bytearray] = {}  # by metadata file: for each row, whether an image has it
    skipped: list[str] = []
    for folder, sizes in tree.walk(skipped):
        names = list(sizes)
        for name in METADATA:
            if name in names and not tree.may_read(folder + name):
                skipped.append(folder + name)
            elif name in names:
                columns.update(_read_columns(tree, folder + name))
                used[folder + name] = bytearray()
        for name in _list_inputs(names):
            if any(fnmatchcase(one, pattern) for pattern in config.exclude for one in (name, folder + name)):
                continue
            piece = Piece(file=_escape_name(folder + name), stop=1, num_bytes=sizes[name])
            if used and _common.is_image(name):
                _note_rows(tree, piece.file, used)
            yield piece
    if skipped:
        few = ", ".join(map(repr, skipped[:NUM_EXAMPLES])) + (", ..." if skipped[NUM_EXAMPLES:] else "")
        reasons = "no permission, or links that lead back or (without source.follow_links) out of the folder"
        progress.say(f"{config.path}: {len(skipped)} folders and metadata files are passed over ({reasons}): {few}")
    _report_unused_rows(tree, used)
    if not config.alt_text and columns:
        _common.report_alt_text("the metadata", columns, candidates=sorted(columns - {FILE_NAME}))
    if config.alt_text and columns and config.alt_text not in columns:
        message = f"no metadata file has a column {config.alt_text!r}; they have {', '.join(sorted(columns))}"
        raise ConfigError("source.alt_text", message)


def place(file: str, config: Config) -> str:
    """The present path of a planned file."""
    return f"{config.path}/{_unescape_name(file)}"


def is_in_place(piece: Piece, config: Config) -> bool:
    """False for a name that no table can hold, and in a plan without sizes: such a run has packed its images."""
    is_named = piece.num_bytes is not None and _unescape_name(piece.file) == piece.file
    return is_named and not _files.is_url(config.path)


def list_statuses(config: Config) -> Iterator[FileStatus]:
    """Each planned file of a local directory, when it, a sidecar or a metadata file above it last changed, and, where
    there is no sidecar, when the directory or one above it did: it may have lost a sidecar or a metadata file."""
    tree, described = _open_tree(config), {"": 0.0}  # directory -> the time of its metadata files and of those above it
    listed = {"": 0.0}  # directory -> the time of its list of files and of those above it
    for folder, sizes in tree.walk([]):
        times = tree.list_times(folder)
        parent = folder.rstrip("/").rpartition("/")[0]
        above = f"{parent}/" if parent else ""
        described[folder] = max([described.get(above, 0.0), *(times[name] for name in METADATA if name in times)])
        listed[folder] = max(listed.get(above, 0.0), times.get("", 0.0))
        stems: dict[str, float] = defaultdict(float)
        for name, time in times.items():
            if _common.parse_extension(name) in SIDECARS:
                stem = name.rpartition(".")[0]
                stems[stem] = max(stems[stem], time)
        odd = _pair_odd_sidecars([*sizes])
        for name in _list_inputs([*sizes]):
            own = [times.get(one, 0.0) for one in (name, *odd.get(name, ()))]
            own += [stems[stem] for stem in (name, name.rpartition(".")[0]) if stem in stems]
            lost = listed[folder] if len(own) == 1 else 0.0
            yield FileStatus(
                file=_escape_name(folder + name),
                changed_at=max([described[folder], *own]),
                lost_at=lost,
                num_bytes=sizes[name],
            )


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The one file of the piece, described by its sidecars and the nearest metadata file."""
    if piece.start > 0 or piece.stop == 0:
        return
    tree, name = _open_tree(config), _unescape_name(piece.file)
    raw = read_texts(piece, config)
    try:
        data = tree.read(name, limit=_common.MAX_IMAGE_BYTES)
        in_place = is_in_place(piece, config)
        file, offset = (f"{config.path}/{piece.file}", 0) if in_place else (None, None)
        yield replace(raw, data=data, file=file, offset=offset)
    except UnusableFileError as error:
        yield replace(raw, error=_explain(error))


def read_texts(piece: Piece, config: Config) -> Raw:
    """The one file of the piece without its bytes, described by its sidecars and the nearest metadata file."""
    raw = Raw(source_key=piece.file, data=None)
    if not _common.is_image(piece.file):
        return raw
    return _add_text(raw, _open_tree(config), _unescape_name(piece.file), config.alt_text)


def _explain(error: UnusableFileError) -> str:
    return f"{error}; set source.follow_links = true to allow it" if str(error) == _files.OUTSIDE else str(error)


def _open_tree(config: Config) -> _trees.Tree:
    return _trees.open_tree(config.path, follow_links=config.follow_links)


def _list_inputs(names: list[str]) -> Iterator[str]:
    images = _list_stems(names)
    odd = {sidecar for group in _pair_odd_sidecars(names).values() for sidecar in group}
    for name in names:
        is_sidecar = name in odd or (_common.parse_extension(name) in SIDECARS and name.rpartition(".")[0] in images)
        if not is_sidecar and name not in METADATA:
            yield name


def _list_stems(names: Iterable[str]) -> set[str]:
    """All that the name of a sidecar may have before its extension: an image's name with and without its own."""
    return {one for name in names if _common.is_image(name) for one in (name, name.rpartition(".")[0])}


def _pair_odd_sidecars(names: Collection[str]) -> dict[str, list[str]]:
    """The sidecars of images whose name differs in case or in how accents are composed, or that end in upper case."""
    stems = _list_stems(names)
    odd: dict[str, list[str]] = defaultdict(list)  # by their loosened stem
    for name in names:
        stem, _, ending = name.rpartition(".")
        if ending.lower() in SIDECARS and not (stem in stems and ending in SIDECARS):
            odd[_common.loosen_name(stem)].append(name)
    pairs: dict[str, list[str]] = defaultdict(list)
    for image in filter(_common.is_image, names if odd else ()):
        for stem in (image.rpartition(".")[0], image):
            for name in odd.get(_common.loosen_name(stem), ()):
                if (own := name.rpartition(".")[0]) == stem or own not in stems:
                    pairs[image].append(name)
    return pairs


def _escape_name(name: str) -> str:
    r"""A file's name as UTF-8, which Linux does not require: other bytes become \xNN, and a literal \xNN \x5cxNN."""
    name = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _unescape_name(name: str) -> str:
    """The inverse of `_escape_name`."""
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), name.encode())
    return os.fsdecode(data)


def _add_text(raw: Raw, tree: _trees.Tree, name: str, column: str) -> Raw:
    files, fields = {}, _find_row(tree, raw.source_key)
    folder, slash, image = name.rpartition("/")
    odd = _list_odd_sidecars(tree, folder + slash, tree.find_version(folder + slash))
    sidecars = [f"{folder}{slash}{one}" for one in odd.get(image, ())]
    sidecars += [f"{stem}.{ending}" for stem in (name.rpartition(".")[0], name) for ending in SIDECARS]
    for sidecar in sidecars:  # an exact name overrides the others
        if not tree.exists(sidecar):
            continue
        ending = _common.parse_extension(sidecar)
        try:
            data = tree.read(sidecar, limit=_common.MAX_TEXT_BYTES)
        except UnusableFileError as error:
            fields[SIDECAR_ERROR] = f"{PurePosixPath(sidecar).name}: {_explain(error)}"
            continue
        if ending == "json":
            fields |= _common.parse_json(data)
        else:
            files[ending] = data
    return _common.add_text(raw, fields, files=files, column=column)


@lru_cache(maxsize=8)
def _list_odd_sidecars(tree: _trees.Tree, folder: str, version: _trees.Version) -> dict[str, list[str]]:  # noqa: ARG001
    """Args: version: it makes a changed directory another cache entry."""
    return _pair_odd_sidecars(tree.list_files(folder))


def _find_row(tree: _trees.Tree, image: str) -> dict[str, Any]:
    """The image's row in the nearest metadata file that has one; empty when none has."""
    for name, relative in _list_metadata(image):
        if tree.may_read(name):
            table = _open_metadata(tree, name)
            if (index := table.find_row(relative)) is not None:
                row: dict[str, Any] = json.loads(table.rows[index].as_py())
                return row
    return {}


def _note_rows(tree: _trees.Tree, image: str, used: Mapping[str, bytearray]) -> None:
    """Marks the image's row in each metadata file as used."""
    for name, relative in _list_metadata(image):
        if (flags := used.get(name)) is not None:
            table = _open_metadata(tree, name)
            if (index := table.find_row(relative)) is not None:
                flags.extend(bytes(max(0, len(table.rows) - len(flags))))
                for double in _find_indices(table.names, table.names[index].as_py()):
                    flags[double] = True


def _report_unused_rows(tree: _trees.Tree, used: Mapping[str, bytearray]) -> None:
    """Prints a line for each metadata file with rows that no image has."""
    for name, flags in used.items():
        table = _open_metadata(tree, name)
        if num_lost := len(table.rows) - sum(flags):
            flags.extend(bytes(max(0, len(table.rows) - len(flags))))
            lost = islice((index for index, is_used in enumerate(flags) if not is_used), NUM_EXAMPLES)
            names = ", ".join(repr(table.names[index].as_py()) for index in lost)
            progress.say(
                f"{name}: {num_lost} of {len(table.rows)} rows name no image in the folder: {names}"
                + (", ..." if num_lost > NUM_EXAMPLES else "")
            )


def _list_metadata(image: str) -> Iterator[tuple[str, str]]:
    """The names that the metadata of an image may have, nearest first, and what it would call the image."""
    path = PurePosixPath(image)
    for folder in path.parents:
        prefix = "" if str(folder) == "." else f"{_unescape_name(str(folder))}/"
        for name in METADATA:
            relative = str(path.relative_to(folder))
            plain = _unescape_name(relative)
            yield prefix + name, plain if replace_surrogates(plain) == plain else relative


def _open_metadata(tree: _trees.Tree, name: str) -> _Table:
    return _load_table(tree, name, tree.find_version(name))


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A metadata file as columns of text: about as large in memory as on disk, in any format."""

    tree: _trees.Tree
    folder: str  # that its names are relative to; "" or ending with a slash
    names: pa.Array  # sorted
    rows: pa.Array  # JSON
    loose_names: pa.Array  # sorted, of the names that `loosen_name` changes
    loose_rows: pa.Array  # their numbers

    def find_row(self, name: str) -> int | None:
        """The number of the row with the name or, without one, of the only row whose name is loosely the same.

        A row that has the exact name of another file is that file's.
        """
        if (exact := next(_find_indices(self.names, name), None)) is not None:
            return exact
        loose = _common.loosen_name(name)
        indices = [*_find_indices(self.names, loose)]
        indices += [self.loose_rows[index].as_py() for index in _find_indices(self.loose_names, loose)]
        free = [index for index in indices if not self._is_file(self.names[index].as_py())]
        return free[0] if len(free) == 1 else None

    def _is_file(self, name: str) -> bool:
        names = (name, _unescape_name(name))  # a literal \xNN, and a byte that no table can hold
        return "\0" not in name and any(self.tree.exists(self.folder + one) for one in names)


def _find_indices(names: pa.Array, name: str) -> Iterator[int]:
    """The positions of a name among sorted names."""
    index = bisect_left(range(len(names)), name, key=lambda index: names[index].as_py())
    while index < len(names) and names[index].as_py() == name:
        yield index
        index += 1


@lru_cache(maxsize=8)
def _load_table(tree: _trees.Tree, path: str, version: _trees.Version) -> _Table:  # noqa: ARG001
    """Args: version: it makes a changed file another cache entry."""
    import pyarrow as pa

    schema = pa.schema([("names", pa.large_string()), ("rows", pa.large_string())])
    chunks, rows = [schema.empty_table()], _read_rows(tree, path)
    try:
        while batch := list(islice(rows, NUM_ROWS)):
            names = [os.path.normpath(replace_surrogates(row.pop(FILE_NAME))) for row in batch]
            chunks.append(pa.table([names, [_common.format_json(row) for row in batch]], schema))
    except (csv.Error, BrokenParquetError) as error:
        raise ConfigError(path, f"cannot be read: {error}") from error
    table = pa.concat_tables(chunks).sort_by("names")
    names = table["names"].combine_chunks()
    loose = ((_common.loosen_name(name.as_py()), index) for index, name in enumerate(names))
    pairs = sorted(pair for pair in loose if pair[0] != names[pair[1]].as_py())
    return _Table(
        tree=tree,
        folder="".join(path.rpartition("/")[:2]),
        names=names,
        rows=table["rows"].combine_chunks(),
        loose_names=pa.array([name for name, _ in pairs], pa.large_string()),
        loose_rows=pa.array([index for _, index in pairs], pa.int64()),
    )


def _read_columns(tree: _trees.Tree, name: str) -> Collection[str]:
    """The columns of a metadata file; those of a .jsonl are its first row's.

    Raises:
        ConfigError: `file_name` is not among them.
    """
    readers = {".csv": _read_csv_columns, ".jsonl": _read_jsonl_columns, ".parquet": _read_parquet_columns}
    with tree.open(name) as stream:
        columns = readers[PurePosixPath(name).suffix](stream)
    if FILE_NAME not in columns:
        others = f"it has {', '.join(columns)}" if columns else "no column can be read"
        raise ConfigError(name, f"has no column {FILE_NAME!r}; {others}")
    return columns


def _read_csv_columns(stream: BinaryIO) -> Collection[str]:
    return next(csv.reader(_open_text(stream, newline="")), [])


def _read_jsonl_columns(stream: BinaryIO) -> Collection[str]:
    return _common.parse_json(next(_open_text(stream, newline="\n"), "{}").encode(errors="surrogateescape")).keys()


def _read_parquet_columns(stream: BinaryIO) -> Collection[str]:
    try:
        names: list[str] = _parquet.open_table(stream).schema_arrow.names
    except BrokenParquetError:
        return []
    return names


def _read_rows(tree: _trees.Tree, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file; one that names no file has the name of its place, which no image has."""
    readers = {".csv": _read_csv_rows, ".jsonl": _read_jsonl_rows, ".parquet": _parquet.read_rows}
    with tree.open(name) as stream:
        for number, row in enumerate(readers[PurePosixPath(name).suffix](stream), 1):
            named = isinstance(row.get(FILE_NAME), str) and row[FILE_NAME]
            yield row if named else {**row, FILE_NAME: f"(row {number} without {FILE_NAME})"}


def _open_text(stream: BinaryIO, *, newline: str) -> TextIO:
    """Opens a text by its byte order mark; without one as UTF-8, other bytes as surrogates."""
    codec = _common.find_mark(stream.read(4)) or "utf-8"
    stream.seek(0)
    errors = "surrogateescape" if codec.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, codec, errors=errors, newline=newline)


def _decode_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `_open_text`; fields that are not UTF-8 are decoded as other texts are."""
    odd = {name: value for name, value in row.items() if isinstance(value, str) and not value.isascii()}
    data = {name: value.encode(errors="surrogateescape") for name, value in odd.items()}
    is_guessed = any(_common.find_encoding(one) == _common.GUESSED_ENCODING for one in data.values())
    decoded = {name: one.decode(_common.find_encoding(one), "replace") for name, one in data.items()}
    return {**row, **decoded, **({_common.ENCODING: _common.GUESSED_ENCODING} if is_guessed else {})}


def _read_csv_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_common.MAX_TEXT_BYTES)
    yield from map(_decode_fields, csv.DictReader(_open_text(stream, newline=""), restkey=""))


def _read_jsonl_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in _open_text(stream, newline="\n"):
        yield _common.parse_json(line.encode(errors="surrogateescape"))
