"""Decides how the output of img2dataset is a corpus: a row of its Parquet is a sample, downloaded or not.

The images are in the tar beside it. How a tar is read is `_tars`' decision; which downloads failed, and why, is
img2dataset's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.errors import BrokenParquetError, ConfigError
from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common, _files, _parquet, _survey, _tars

DONE = "_stats.json"  # img2dataset writes it when a shard is finished


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = key(help="img2dataset's output folder, its output_format webdataset", stamp=False, locate="path")
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    scratch: str = key("", _tars.SCRATCH_HELP, stamp=False, locate="path")
    max_tar_bytes: int = key(10**11, _tars.MAX_TAR_HELP, least=1)


def claims(path: str) -> bool:
    """True for a directory of tars in which a finished shard has its statistics beside it."""
    survey = _survey.survey_directory(path)
    return bool(survey.is_archive and survey.tars and survey.stats)


def pieces(config: Config) -> Iterator[Piece]:
    """The finished shards, by their tars; those that img2dataset still writes are for a later plan.

    Raises:
        ConfigError: there is none, or the first has no column of the configured name.
    """
    files = list(_files.find(config.path, (".tar", DONE)))
    done = {piece.file.removesuffix(DONE) for piece in files if piece.file.endswith(DONE)}
    shards = [piece for piece in files if piece.file.endswith(".tar") and piece.file.removesuffix(".tar") in done]
    if not shards:
        message = f'{config.path!r} has no tar with its {DONE} beside it; for tars alone there is kind = "webdataset"'
        raise ConfigError("source.path", message)
    if config.alt_text:
        _check(_table_of(shards[0], config), config.alt_text)
    yield from shards


def place(file: str, config: Config) -> str:
    """Where a planned tar lies now."""
    return _files.place(file, config.path)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the shard's Parquet, in its order, then what only the tar has."""
    with _tars.opened(place(piece.file, config), scratch=config.scratch, max_bytes=config.max_tar_bytes) as tar:
        yield from islice(_raws(_table_of(piece, config), tar, config.alt_text), piece.start, piece.stop)


def _raws(table: str, tar: _tars.Tar, column: str) -> Iterator[Raw]:
    samples: dict[str, _tars.Sample] = {}
    doubles = [sample for sample in tar.samples() if samples.setdefault(sample.key, sample) is not sample]
    unknown = None
    try:
        for row in _rows(table):
            sample = samples.pop(str(row.get("key")), None)
            raw = _missing(row) if sample is None else tar.image(sample)
            yield _common.describe(raw, row, column=column)
    except (BrokenParquetError, FileNotFoundError) as error:
        unknown = f"which downloads failed is not known: {error}"
    yield from (tar.raw(sample, column=column) for sample in (*samples.values(), *doubles))
    if unknown:
        yield Raw(source_key=table.rpartition("/")[2], data=None, error=unknown)


def _missing(row: dict[str, Any]) -> Raw:
    """A row of which the tar has nothing."""
    error = f"{row.get('status')}: {row.get('error_message')}"
    if row.get("status") == "success":
        error = "img2dataset says success, but the tar has no such sample"
    return Raw(source_key=_common.clean(str(row.get("key"))), data=None, error=error)


def _table_of(piece: Piece, config: Config) -> str:
    return f"{place(piece.file, config).removesuffix('.tar')}.parquet"


def _rows(file: str) -> Iterator[dict[str, Any]]:
    with _files.opened(file) as stream:
        table = _parquet.table(stream)
        for group, _ in _parquet.groups(table):
            for batch in _parquet.batches(table, table.schema_arrow.names, group=group):
                yield from _columns.values(batch)


def _check(file: str, column: str) -> None:
    with _files.opened(file) as stream:
        names = _parquet.table(stream).schema_arrow.names
    if column not in names:
        raise ConfigError("source.alt_text", f"there is no column {column!r}; there are {', '.join(names)}")
