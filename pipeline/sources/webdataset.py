"""Tars in webdataset's format: one tar is one piece, and a plain local one is read where it is.

It refuses to know what is in a tar (`_tars`). The number of its samples is unknown until it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.records import FileStatus, Piece, Raw
from pipeline.sections import key
from pipeline.sources import _common, _files, _survey, _tars


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str | tuple[str, ...] = _files.declare_paths(".tar")
    image: str = key("", "the extension of the image where a sample has several; empty: the first that is an image's")
    split_keys: _tars.SplitAt = key(
        "first",
        "the dot of a file name at which the sample's key ends: first, as webdataset has it, or last",
        stamp_default=False,
    )
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    scratch: str = key("", _tars.SCRATCH_HELP, stamp=False, locate="path")
    max_tar_bytes: int = key(10**11, _tars.MAX_TAR_HELP, least=1)


def claims(path: str) -> bool:
    """True for tars, and for a directory that holds tars rather than images."""
    survey = _survey.survey_directory(path)
    return bool(survey.is_archive and survey.tars) or _survey.has_ending(path, _tars.ENDINGS)


def pieces(config: Config) -> Iterator[Piece]:
    """The tars, none of them opened.

    Raises:
        ConfigError: a path matches no tar.
    """
    return _files.find_files(config.path, _tars.ENDINGS)


def list_statuses(config: Config) -> Iterator[FileStatus]:
    """The local files as they are now."""
    return _files.list_statuses(config.path, _tars.ENDINGS)


def place(file: str, config: Config) -> str:
    """The present path of a planned tar."""
    return _files.locate_file(file, config.path)


def is_in_place(piece: Piece, config: Config) -> bool:
    """True for a plain local tar, by its name."""
    return _tars.is_plain(place(piece.file, config))


def count(piece: Piece, config: Config) -> int | None:
    """The samples of a plain local tar, from its headers; None for another, which would be unpacked or fetched."""
    if not is_in_place(piece, config):
        return None
    with _tars.open_tar(place(piece.file, config), scratch=config.scratch, max_bytes=config.max_tar_bytes) as tar:
        return sum(1 for _ in _list_samples(tar, config))


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The samples of a tar, in its order; then the images that none of them takes, unless the config chooses."""
    with _tars.open_tar(place(piece.file, config), scratch=config.scratch, max_bytes=config.max_tar_bytes) as tar:
        for sample in islice(_list_samples(tar, config), piece.start, piece.stop):
            yield tar.read_sample(sample, column=config.alt_text, extension=config.image)


def _list_samples(tar: _tars.Tar, config: Config) -> Iterator[_tars.TarSample]:
    others: list[_tars.TarSample] = []
    for sample in tar.list_samples(config.split_keys):
        yield sample
        if not config.image:
            others += sample.list_other_images()
    yield from others
