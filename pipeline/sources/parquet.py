"""Parquet files with images in them: a file is a piece, its rows are the samples, and its footer says how many.

`_columns` decides the meaning of the columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import BrokenParquetError, ConfigError, MachineError
from pipeline.records import FileStatus, Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common, _files, _parquet, _survey

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ALLOW_HELP = "whether files that have changed since they were planned are read, since rows were only appended to them"


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str | tuple[str, ...] = _files.declare_paths(".parquet")
    image: str = key("", _columns.IMAGE_HELP)
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    source_key: str = key("", _columns.KEY_HELP)
    image_root: str = key("", _columns.ROOT_HELP, stamp=False, locate="path")
    allow_rewritten: bool = key(False, ALLOW_HELP, stamp=False)


def claims(path: str) -> bool:
    """True for Parquet files, and for a directory that holds them rather than tars or images."""
    survey = _survey.survey_directory(path)
    return bool(survey.is_archive and not survey.tars) or _survey.has_ending(path, _survey.TABLES)


def pieces(config: Config) -> Iterator[Piece]:
    """The files with their numbers of rows; a broken one is a piece of unknown length.

    Raises:
        ConfigError: a path matches no file, or the columns of the first whole file do not match the config.
    """
    is_checked = False
    for piece in _files.find_files(config.path, _survey.TABLES):
        try:
            with _files.open_file(place(piece.file, config)) as stream:
                table = _parquet.open_table(stream)
                stop = table.metadata.num_rows
                if not is_checked:
                    _columns.report_alt_text(table.schema_arrow, _choose_columns(table, config))
                    is_checked = True
        except BrokenParquetError:
            yield piece
            continue
        yield replace(piece, stop=stop)


def list_statuses(config: Config) -> Iterator[FileStatus]:
    """The local files as they are now."""
    return _files.list_statuses(config.path, _survey.TABLES)


def place(file: str, config: Config) -> str:
    """The present path of a planned file."""
    return _files.locate_file(file, config.path)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the piece; each that cannot be read is a row with an error.

    Raises:
        MachineError: the file has been rewritten since it was planned, so that its rows may be others.
    """
    name = piece.file.rpartition("/")[2]
    with _files.open_file(place(piece.file, config)) as stream:
        if not config.allow_rewritten:
            _check_unchanged(stream, piece)
        try:
            table = _parquet.open_table(stream)
            columns = _choose_columns(table, config)
        except (BrokenParquetError, ConfigError) as error:
            stop = piece.start + 1 if piece.stop is None else piece.stop
            yield from _make_lost_rows(range(piece.start, stop), name, str(error))
            return
        num_rows = table.metadata.num_rows
        if not config.allow_rewritten and piece.stop is not None and num_rows < piece.stop:  # in as many bytes
            raise _make_rewritten_error(piece, f"it has {num_rows} rows and had at least {piece.stop}")
        selected = range(piece.start, num_rows if piece.stop is None else piece.stop)
        for group, rows in _parquet.list_groups(table):
            if part := range(max(rows.start, selected.start), min(rows.stop, selected.stop)):
                batches = _parquet.read_batches(table, columns.names, group=group)
                yield from _read_group(batches, rows.start, part, columns, config, name)
        lost = range(max(num_rows, selected.start), selected.stop)
        yield from _make_lost_rows(lost, name, f"the file now has {num_rows} rows")


def _check_unchanged(stream: BinaryIO, piece: Piece) -> None:
    num_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if piece.stop is not None and piece.num_bytes not in (None, num_bytes):
        raise _make_rewritten_error(piece, f"it has {num_bytes} bytes and had {piece.num_bytes}")


def _make_rewritten_error(piece: Piece, difference: str) -> MachineError:
    return MachineError(
        f"{piece.file} has been rewritten since it was planned: {difference}; restore it or make a new run, or if rows"
        " were only appended, set source.allow_rewritten = true"
    )


def _read_group(
    batches: Iterator[pa.RecordBatch], row: int, selected: range, columns: _columns.Columns, config: Config, name: str
) -> Iterator[Raw]:
    """The selected rows of a row group of which `row` is the first."""
    roots, reason = (config.image_root,) if config.image_root else (), "its row group ends before it"
    try:
        for batch in batches:
            if part := range(max(row, selected.start), min(row + batch.num_rows, selected.stop)):
                rows = batch.slice(part.start - row, len(part))
                yield from _columns.read_samples(rows, columns, first=part.start, name=name, roots=roots)
            row += batch.num_rows
            if row >= selected.stop:
                return
    except BrokenParquetError as error:
        reason = str(error)
    yield from _make_lost_rows(range(max(row, selected.start), selected.stop), name, reason)


def _make_lost_rows(rows: range, name: str, error: str) -> Iterator[Raw]:
    return (_columns.make_lost_row(row, name=name, error=error) for row in rows)


def _choose_columns(table: pq.ParquetFile, config: Config) -> _columns.Columns:
    return _columns.choose_columns(
        table.schema_arrow,
        image=config.image,
        source_key=config.source_key,
        alt_text=config.alt_text,
        short=_columns.list_short_columns(table),
    )
