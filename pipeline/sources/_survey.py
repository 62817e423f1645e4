"""Samples of the file names under a path, to tell its kind of source without listing or opening everything.

It refuses to know what each kind of source looks like: each source decides from the names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

from pipeline.errors import ConfigError
from pipeline.sources import _common, _files, _tars
from pipeline.storage import stores

MAX_LEVELS, MAX_FOLDERS, MAX_NAMES = 5, 3, 2000  # nested directories, and the subdirectories and names read in each
TABLES = (".parquet", ".pq")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Names of files below a directory, relative to it."""

    tars: tuple[str, ...]
    tables: tuple[str, ...]
    images: tuple[str, ...]
    stats: tuple[str, ...]  # that img2dataset writes beside each finished tar

    @property
    def is_archive(self) -> bool:
        """Tars and tables outnumber loose images, so the images are in those."""
        return len(self.tars) + len(self.tables) >= max(1, len(self.images))


def survey_directory(path: str) -> Survey:
    """The top level of a directory and, when that has no tar and at most one table (an index?), some of what is below.

    Every kind is empty when the path is not a directory.
    """
    if not is_directory(path):
        return _sort_names(())
    survey = _sort_names(_sample_names(path, levels=1))
    return sample_tree(path) if not survey.tars and len(survey.tables) < 2 else survey


def is_directory(path: str) -> bool:
    """True for a local directory, and for a URL below which there are files; a web address has no extension then."""
    if not _files.is_url(path):
        return Path(path).is_dir()
    plain = path.partition("?")[0]
    is_file = plain.endswith((*_tars.ENDINGS, *TABLES)) or (plain.startswith("http") and PurePosixPath(plain).suffix)
    if is_file or _files.is_pattern(plain):
        return False
    with suppress(ConfigError):  # nothing opens such URLs
        return bool(_list_remote(path))
    return False


def sample_tree(path: str) -> Survey:
    """A sample of all levels of a directory."""
    return _sort_names(_sample_names(path, levels=MAX_LEVELS))


def has_ending(path: str, endings: tuple[str, ...]) -> bool:
    """True when a file, glob, brace range or URL has one of the endings.

    A glob without an extension counts when it matches a file that has one.
    """
    if Path(path).is_dir():
        return False
    plain = path.partition("?")[0] if _files.is_url(path) else path
    if plain.endswith(endings):
        return True
    if PurePosixPath(plain).suffix not in ("", ".*") or not _files.is_pattern(path):
        return False
    with suppress(ConfigError):  # it matches no file
        return any(piece.file.endswith(endings) for piece in islice(_files.find_files(path, endings), MAX_NAMES))
    return False


def _sort_names(names: Iterable[str]) -> Survey:
    names = list(names)
    return Survey(
        tars=tuple(name for name in names if name.endswith(_tars.ENDINGS)),
        tables=tuple(n for n in names if n.endswith(TABLES) and n.rpartition("/")[2] != "metadata.parquet"),
        images=tuple(name for name in names if _common.is_image(name)),
        stats=tuple(name for name in names if name.endswith("_stats.json")),
    )


def _sample_names(path: str, *, levels: int, prefix: str = "") -> Iterator[str]:
    """Names of files in a directory and in the first few below it; hidden ones are skipped."""
    is_url = _files.is_url(path)
    names = _list_remote(f"{path.rstrip('/')}/{prefix}") if is_url else _list_local(Path(path, prefix))
    visible = sorted(name for name in names if name[0] != ".")
    yield from (prefix + name for name in visible if name[-1] != "/")
    if levels > 1:
        for name in [name for name in visible if name[-1] == "/"][:MAX_FOLDERS]:
            with suppress(PermissionError):  # lost+found, which no source reads either
                yield from _sample_names(path, levels=levels - 1, prefix=prefix + name)


def _list_local(folder: Path) -> list[str]:
    """Some names of files and, ending with a slash, of directories; links to directories are neither."""
    with os.scandir(folder) as entries:
        some = list(islice(entries, MAX_NAMES))
        folders = [f"{entry.name}/" for entry in some if entry.is_dir(follow_symlinks=False)]
        return [*folders, *(entry.name for entry in some if entry.is_file())]


@lru_cache(maxsize=64)
def _list_remote(url: str) -> tuple[str, ...]:
    """As `_list_local`, for a URL. Listed once, since several sources ask."""
    return tuple(islice(stores.list_folder(url), MAX_NAMES))
