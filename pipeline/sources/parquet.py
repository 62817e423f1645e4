"""Decides how Parquet files with images in them are a corpus: a file is a piece, its rows are the samples.

Their footers say how many rows there are. What the columns mean is `_columns`' decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import BrokenParquetError, ConfigError
from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common, _files, _parquet, _survey

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str | tuple[str, ...] = key(
        help="Parquet: files, folders, globs, ranges as in {00000..00099}.parquet, URLs that fsspec opens, or a list",
        stamp=False,
        locate="path",
    )
    image: str = key("", _columns.IMAGE_HELP)
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    source_key: str = key("", _columns.KEY_HELP)
    image_root: str = key("", _columns.ROOT_HELP, stamp=False, locate="path")


def claims(path: str) -> bool:
    """True for Parquet files, and for a directory that holds them rather than tars or images."""
    survey = _survey.survey_directory(path)
    return bool(survey.is_archive and not survey.tars) or _survey.has_ending(path, _survey.TABLES)


def pieces(config: Config) -> Iterator[Piece]:
    """The files with their numbers of rows; one that is broken is a piece of unknown length.

    Raises:
        ConfigError: a path means no file, or the columns of the first whole file are not what the config says.
    """
    checked = False
    for piece in _files.find(config.path, _survey.TABLES):
        try:
            with _files.opened(place(piece.file, config)) as stream:
                table = _parquet.table(stream)
                stop, schema = table.metadata.num_rows, table.schema_arrow
        except BrokenParquetError:
            yield piece
            continue
        if not checked:
            _choose(schema, config)
            checked = True
        yield replace(piece, stop=stop)


def place(file: str, config: Config) -> str:
    """Where a planned file lies now."""
    return _files.place(file, config.path)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the piece; each that cannot be read is a row with an error."""
    name = piece.file.rpartition("/")[2]
    with _files.opened(place(piece.file, config)) as stream:
        try:
            table = _parquet.table(stream)
            columns = _choose(table.schema_arrow, config)
        except (BrokenParquetError, ConfigError) as error:
            stop = piece.start + 1 if piece.stop is None else piece.stop
            yield from _lost(range(piece.start, stop), name, str(error))
            return
        num_rows = table.metadata.num_rows
        wanted = range(piece.start, num_rows if piece.stop is None else piece.stop)
        for group, rows in _parquet.groups(table):
            if part := range(max(rows.start, wanted.start), min(rows.stop, wanted.stop)):
                batches = _parquet.batches(table, columns.all, group=group)
                yield from _read_group(batches, rows.start, part, columns, config, name)
        yield from _lost(range(max(num_rows, wanted.start), wanted.stop), name, f"the file now has {num_rows} rows")


def _read_group(
    batches: Iterator[pa.RecordBatch], row: int, wanted: range, columns: _columns.Columns, config: Config, name: str
) -> Iterator[Raw]:
    """The wanted rows of a row group of which `row` is the first."""
    roots, why = (config.image_root,) if config.image_root else (), "its row group ends before it"
    try:
        for batch in batches:
            if part := range(max(row, wanted.start), min(row + batch.num_rows, wanted.stop)):
                rows = batch.slice(part.start - row, len(part))
                yield from _columns.raws(rows, columns, first=part.start, name=name, roots=roots)
            row += batch.num_rows
            if row >= wanted.stop:
                return
    except BrokenParquetError as error:
        why = str(error)
    yield from _lost(range(max(row, wanted.start), wanted.stop), name, why)


def _lost(rows: range, name: str, error: str) -> Iterator[Raw]:
    return (_columns.lost(row, name=name, error=error) for row in rows)


def _choose(schema: pa.Schema, config: Config) -> _columns.Columns:
    return _columns.choose(schema, image=config.image, source_key=config.source_key, alt_text=config.alt_text)
