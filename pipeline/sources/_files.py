"""Files of a corpus: those that a path in `[source]` matches (globs, braces, directories, URLs), and safe reads.

It refuses to know what is in the files, and to follow a name in the data to anywhere outside the corpus.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import machine, progress
from pipeline.errors import ConfigError, UnusableFileError
from pipeline.records import FileStatus, Piece
from pipeline.sections import key
from pipeline.sources import _common
from pipeline.storage import stores

FIELD = "source.path"
OUTSIDE = "it leads out of the folder"
UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR)


def declare_paths(ending: str) -> Any:
    """The `path` key of a source that reads files with an ending."""
    files = f"{ending} files, folders of them, globs, ranges as in {{00000..00099}}{ending}"
    return key(help=f"{files}, URLs that fsspec opens, or a list of those", stamp=False, locate="path")


def find_files(paths: str | tuple[str, ...], endings: tuple[str, ...]) -> Iterator[Piece]:
    """The files that the paths match, in order, each once, as pieces of unknown length.

    Files below the single directory that `paths` names get names relative to it, so that the corpus may be moved.

    Args:
        paths: files, directories (everything below with one of `endings`), globs, brace ranges, fsspec URLs of these.
        endings: of file names, as in `.tar`.

    Raises:
        ConfigError: a path does not exist, or matches no file.
    """
    seen: set[str] = set()
    base = _find_base(paths)
    for path in (paths,) if isinstance(paths, str) else paths:
        is_empty = True
        for piece in _match_path(path.removeprefix("file://"), endings):
            is_empty = False
            if piece.file not in seen:
                seen.add(piece.file)
                yield replace(piece, file=piece.file.removeprefix(f"{base}/")) if base else piece
        if is_empty:
            raise ConfigError(FIELD, f"{path!r} matches no file; files must end with {', '.join(endings)}")


def list_statuses(paths: str | tuple[str, ...], endings: tuple[str, ...]) -> Iterator[FileStatus]:
    """The local files that `find_files` finds, as they are now."""
    for piece in find_files(paths, endings):
        if not is_url(place := locate_file(piece.file, paths)):
            status = Path(place).stat()
            yield FileStatus(file=piece.file, changed_at=status.st_mtime, num_bytes=status.st_size)


def locate_file(file: str, paths: str | tuple[str, ...]) -> str:
    """The present path of a file that `find_files` has named."""
    return file if is_url(file) or file.startswith("/") else f"{_find_base(paths)}/{file}"


def _find_base(paths: str | tuple[str, ...]) -> str:
    """The directory that a single local path names, or the one that holds its matches; "" for several paths and URLs.

    >>> _find_base("/corpus/2024-*/{00..99}.tar")
    '/corpus'
    """
    if not isinstance(paths, str) or is_url(path := paths.removeprefix("file://")):
        return ""
    absolute = Path(path).absolute()
    if absolute.is_dir():
        return str(absolute)
    plain = str(absolute) if absolute.exists() else re.split(r"[*?\[{]", str(absolute), maxsplit=1)[0]
    return plain.rpartition("/")[0]


def check_directory(path: str) -> None:
    """
    Raises:
        ConfigError: the path or URL does not exist, or is not a directory.
    """
    if is_url(path):
        if not stores.list_folder(path):
            raise ConfigError(FIELD, f"{path!r} has no files; write the URL of a folder")
    elif not Path(path).is_dir():
        problem = "is a file" if Path(path).exists() else "does not exist"
        raise ConfigError(FIELD, f"{path!r} {problem}; write the path of a folder")


def _match_path(path: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    for one in [path] if Path(path).exists() else expand_braces(path):
        yield from _match_url(one, endings) if is_url(one) else _match_local(one, endings)


def _match_local(path: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    if Path(path).is_dir():
        errors: list[OSError] = []
        for parent, folders, files in os.walk(path, onerror=errors.append):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            matches = sorted(name for name in files if name[0] != "." and name.endswith(endings))
            yield from (_make_piece(f"{parent}/{name}") for name in matches)
        if errors:
            progress.say(f"{path}: {len(errors)} folders cannot be listed and are passed over: {errors[0]}")
    elif Path(path).exists():
        yield _make_piece(path)
    elif glob.has_magic(path):
        names = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        yield from (_make_piece(name) for name in names if Path(name).is_file())
    else:
        raise ConfigError(FIELD, f"{path!r} does not exist; write the path of a file or folder, a glob or a URL")


def _make_piece(file: str) -> Piece:
    path = Path(file).absolute()
    if path.as_posix() != path.as_posix().encode("utf-8", "replace").decode():
        raise ConfigError(FIELD, f"{path!r} is not UTF-8, so no table can hold it; rename it")
    return Piece(file=str(path), num_bytes=path.stat().st_size)


def _match_url(url: str, endings: tuple[str, ...]) -> Iterator[Piece]:
    if url.partition("?")[0].endswith(endings) and not glob.has_magic(url.partition("?")[0]):
        yield Piece(file=url)
        return
    for file, num_bytes in stores.find_files(url):
        if file.partition("?")[0].endswith(endings):
            yield Piece(file=file, num_bytes=num_bytes)


def is_url(path: str) -> bool:
    return "://" in path


def is_pattern(path: str) -> bool:
    """True for a glob or a brace range."""
    return glob.has_magic(path) or "{" in path


def expand_braces(path: str) -> Iterator[str]:
    """Braces as in a shell and in webdataset.

    >>> list(expand_braces("{a,b}/{08..10}.tar"))[:4]
    ['a/08.tar', 'a/09.tar', 'a/10.tar', 'b/08.tar']
    """
    braces = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", path)
    if not braces:
        yield path
        return
    choices: Iterable[str] = braces[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        width = max(map(len, span.groups())) if any(end.startswith("0") for end in span.groups()) else 0
        choices = (str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1))
    for choice in choices:
        yield from expand_braces(path[: braces.start()] + choice + path[braces.end() :])


def open_file(file: str) -> BinaryIO:
    """Opens a file or URL of the corpus for reading.

    Raises:
        OSError, MachineError: it cannot be opened. That is the machine's error, since it existed when it was planned.
    """
    return stores.open_url(file) if is_url(file) else open(file, "rb")


def is_inside(path: str, root: str) -> bool:
    """True when a path is below the directory `root` after all links are resolved."""
    home = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(path), home]) == home


def read_inside(path: str, root: str, *, limit: int, follow_links: bool = False) -> bytes:
    """Reads a file that is inside the directory `root` after all links are resolved.

    Args:
        limit: of its size, in bytes.
        follow_links: reads it wherever links lead.

    Raises:
        UnusableFileError: it is elsewhere, missing, not a regular file, too large, or may not be read.
        OSError: the disk failed, or the directory itself is gone.
    """
    with open_inside(path, root, follow_links=follow_links) as stream:
        if problem := _common.explain_size(os.fstat(stream.fileno()).st_size, limit):
            raise UnusableFileError(problem)
        return stream.read()


@contextmanager
def open_inside(path: str, root: str, *, follow_links: bool = False) -> Iterator[BinaryIO]:
    """Opens a file as `read_inside` does; raises the same errors."""
    try:
        real = os.path.realpath(path)
        if not follow_links and not is_inside(real, root):
            raise UnusableFileError(OUTSIDE)
        status = Path(real).stat()  # before it is opened, since opening a pipe blocks
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        stream = open(real, "rb")
    except OSError as error:
        if error.errno not in UNREADABLE or not Path(root).is_dir():
            raise
        raise UnusableFileError(f"it cannot be read: {error.strerror}") from error
    with stream:
        yield stream


def read_zipped(url: str, root: str, *, limit: int) -> bytes:
    """Reads a member of a zip archive inside the directory `root`, named as `datasets` does: `zip://MEMBER::ARCHIVE`.

    Raises:
        UnusableFileError: the archive or the member is elsewhere, missing, damaged, encrypted or too large.
        OSError: as `read_inside`.
    """
    member, _, archive = url.removeprefix("zip://").partition("::")
    with open_inside(archive, root) as stream:

        def unpack() -> bytes:
            with zipfile.ZipFile(stream) as files, files.open(member) as data:
                return data.read(limit + 1)

        try:
            content = unpack()
        except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            machine.rule_out(error, unpack, needed=limit)
            raise UnusableFileError(f"it cannot be read from its archive: {error}") from error
    if problem := _common.explain_size(len(content), limit):
        raise UnusableFileError(problem)
    return content
