"""Decides which files a path in `[source]` means, and what of them may be opened: globs, braces, folders and URLs.

It refuses to know what is in the files, and to follow a name in the data to anywhere outside the corpus.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import ConfigError, UnusableFileError
from pipeline.records import Piece

FIELD = "source.path"
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR)


def find(paths: str | tuple[str, ...], endings: tuple[str, ...]) -> Iterator[Piece]:
    """The files that the paths mean, in order, each once, as pieces of unknown length.

    What lies below the one folder that `paths` means is named from there, so that the corpus may be moved.

    Args:
        paths: files, folders (all below with one of `endings`), globs, brace ranges, fsspec URLs of any of those.
        endings: what the names of the wanted files end with, as in `.tar`.

    Raises:
        ConfigError: a path does not exist, or means no file.
    """
    seen: set[str] = set()
    home = _home(paths)
    for path in (paths,) if isinstance(paths, str) else paths:
        some = False
        for piece in _meant(path.removeprefix("file://"), endings):
            some = True
            if piece.file not in seen:
                seen.add(piece.file)
                yield replace(piece, file=piece.file.removeprefix(f"{home}/")) if home else piece
        if not some:
            raise ConfigError(FIELD, f"{path!r} means no file; files that end with {', '.join(endings)} are looked for")


def place(file: str, paths: str | tuple[str, ...]) -> str:
    """Where a file that `find` has named lies now."""
    return file if is_url(file) or file.startswith("/") else f"{_home(paths)}/{file}"


def _home(paths: str | tuple[str, ...]) -> str:
    """The folder that one local path means, or in which what it means lies; "" for several paths and for URLs.

    >>> _home("/corpus/2024-*/{00..99}.tar")
    '/corpus'
    """
    if not isinstance(paths, str) or is_url(path := paths.removeprefix("file://")):
        return ""
    here = Path(path).absolute()
    if here.is_dir():
        return str(here)
    plain = re.split(r"[*?\[{]", str(here), maxsplit=1)[0] if not here.exists() else str(here)
    return plain.rpartition("/")[0]


def folder(path: str) -> Path:
    """The folder that a path means.

    Raises:
        ConfigError: it does not exist, or is no folder.
    """
    if not Path(path).is_dir():
        what = "is a file" if Path(path).exists() else "does not exist"
        raise ConfigError(FIELD, f"{path!r} {what}; write the path of a folder")
    return Path(path)


def _meant(path: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    for one in [path] if Path(path).exists() else expand(path):
        yield from _remote(one, endings) if is_url(one) else _local(one, endings)


def _local(path: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    if Path(path).is_dir():
        yield from map(_piece, _below(path, endings))
    elif Path(path).exists():
        yield _piece(path)
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        yield from (_piece(file) for file in found if Path(file).is_file())
    else:
        raise ConfigError(FIELD, f"{path!r} does not exist; write the path of a file or folder, a glob or a URL")


def _below(folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (f"{parent}/{name}" for name in sorted(files) if name[0] != "." and name.endswith(endings))


def _piece(file: str) -> Piece:
    path = Path(file).absolute()
    if path.as_posix() != path.as_posix().encode("utf-8", "replace").decode():
        raise ConfigError(FIELD, f"{path!r} is not UTF-8, so no table can hold it; rename it")
    return Piece(file=str(path), num_bytes=path.stat().st_size)


def _remote(url: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    if url.partition("?")[0].endswith(endings) and not glob.has_magic(url.partition("?")[0]):
        yield Piece(file=url)
        return
    filesystem, path = _filesystem(url)
    pattern = path if glob.has_magic(path) else f"{path.rstrip('/')}/**"
    for name, about in sorted(filesystem.glob(pattern, detail=True).items()):
        if about["type"] == "file" and name.partition("?")[0].endswith(endings):
            yield Piece(file=filesystem.unstrip_protocol(name), num_bytes=about.get("size"))


def _filesystem(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(FIELD, f"{url!r} cannot be opened: {error}") from error


def is_url(path: str) -> bool:
    return "://" in path


def is_pattern(path: str) -> bool:
    """True for a glob or a brace range."""
    return glob.has_magic(path) or "{" in path


def expand(path: str) -> Iterator[str]:
    """Braces as in a shell and in webdataset.

    >>> list(expand("{a,b}/{08..10}.tar"))[:4]
    ['a/08.tar', 'a/09.tar', 'a/10.tar', 'b/08.tar']
    """
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", path)
    if not found:
        yield path
        return
    choices: Iterable[str] = found[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width = max(map(len, span.groups())) if any(end.startswith("0") for end in span.groups()) else 0
        choices = (str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1))
    for choice in choices:
        yield from expand(path[: found.start()] + choice + path[found.end() :])


def opened(file: str) -> BinaryIO:
    """A file or URL of the corpus, to be read from its beginning.

    Raises:
        OSError: it cannot be opened: the machine's error, for it was there when it was planned.
    """
    if not is_url(file):
        return open(file, "rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(file, "rb").open())


def inside(path: str, root: str, *, most: int) -> bytes:
    """The bytes of a file that lies in the folder `root`, wherever links lead.

    Args:
        most: bytes that it may have.

    Raises:
        UnusableFileError: it lies elsewhere, does not exist, is no plain file, is too large, or may not be read.
        OSError: the disk failed, or the folder itself is gone.
    """
    try:
        real, home = os.path.realpath(path), os.path.realpath(root)
        if os.path.commonpath([real, home]) != home:
            raise UnusableFileError("it leads out of the folder")
        return _plain_file(real, most=most)
    except OSError as error:
        if error.errno not in NOT_THERE or not Path(root).is_dir():
            raise
        raise UnusableFileError(f"it cannot be read: {error.strerror}") from error


def _plain_file(path: str, *, most: int) -> bytes:
    about = Path(path).stat()  # before it is opened: to open a pipe is to wait for ever
    if not stat.S_ISREG(about.st_mode):
        raise UnusableFileError("it is a folder" if stat.S_ISDIR(about.st_mode) else "it is no plain file")
    if about.st_size > most:
        raise UnusableFileError(f"its {about.st_size} bytes are more than the {most} that one may have")
    return Path(path).read_bytes()
