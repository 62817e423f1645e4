"""The output of img2dataset: each row of its Parquet is a sample, downloaded or not, with its image in the tar beside.

`_tars` decides how a tar is read; img2dataset, which downloads failed, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.errors import BrokenParquetError, ConfigError
from pipeline.records import FileStatus, Piece, Raw, replace_surrogates
from pipeline.sections import key
from pipeline.sources import _common, _files, _parquet, _survey, _tars

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
    """The finished shards, by their tars; unfinished ones are left for a later plan.

    Raises:
        ConfigError: there is none, or the first has no column of the configured name.
    """
    files = list(_files.find_files(config.path, (".tar", DONE)))
    done = {piece.file.removesuffix(DONE) for piece in files if piece.file.endswith(DONE)}
    shards = [piece for piece in files if piece.file.endswith(".tar") and piece.file.removesuffix(".tar") in done]
    if not shards:
        message = f'{config.path!r} has no tar with its {DONE} beside it; for tars alone set kind = "webdataset"'
        raise ConfigError("source.path", message)
    if config.alt_text:
        with _files.open_file(_locate_table(shards[0], config)) as stream:
            names = _parquet.open_table(stream).schema_arrow.names
        if config.alt_text not in names:
            message = f"there is no column {config.alt_text!r}; there are {', '.join(names)}"
            raise ConfigError("source.alt_text", message)
    yield from shards


def list_statuses(config: Config) -> Iterator[FileStatus]:
    """The local files as they are now."""
    return _files.list_statuses(config.path, (".tar",))


def place(file: str, config: Config) -> str:
    """The present path of a planned tar."""
    return _files.locate_file(file, config.path)


def is_in_place(piece: Piece, config: Config) -> bool:
    """True for a plain local tar, by its name."""
    return _tars.is_plain(place(piece.file, config))


def count(piece: Piece, config: Config) -> int | None:
    """The rows of the shard's Parquet; None where it is remote or cannot be read."""
    if not is_in_place(piece, config):
        return None
    try:
        with _files.open_file(_locate_table(piece, config)) as stream:
            return int(_parquet.open_table(stream).metadata.num_rows)
    except (BrokenParquetError, FileNotFoundError):
        return None


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the shard's Parquet, in its order, then samples that only the tar has."""
    with _tars.open_tar(place(piece.file, config), scratch=config.scratch, max_bytes=config.max_tar_bytes) as tar:
        yield from islice(_join_rows(_locate_table(piece, config), tar, config.alt_text), piece.start, piece.stop)


def _join_rows(table: str, tar: _tars.Tar, column: str) -> Iterator[Raw]:
    samples: dict[str, _tars.TarSample] = {}
    doubles = [one for one in tar.list_samples() if samples.setdefault(one.key, one) is not one]
    table_error = None
    try:
        with _files.open_file(table) as stream:
            for row in _parquet.read_rows(stream):
                sample = samples.pop(str(row.get("key")), None)
                raw = _make_missing(row) if sample is None else tar.read_image(sample)
                yield _common.add_text(raw, row, column=column)
    except (BrokenParquetError, FileNotFoundError) as error:
        table_error = f"the failed downloads are unknown: {error}"
    yield from (tar.read_sample(sample, column=column) for sample in (*samples.values(), *doubles))
    if table_error:
        yield Raw(source_key=table.rpartition("/")[2], data=None, error=table_error)


def _make_missing(row: dict[str, Any]) -> Raw:
    """A row without a sample in the tar."""
    error = f"{row.get('status')}: {row.get('error_message')}"
    if row.get("status") == "success":
        error = "img2dataset reports success, but the tar has no such sample"
    return Raw(source_key=replace_surrogates(str(row.get("key"))), data=None, error=error)


def _locate_table(piece: Piece, config: Config) -> str:
    return f"{place(piece.file, config).removesuffix('.tar')}.parquet"
