"""A directory of a corpus, on this machine or in a store: its files, by their names relative to it.

It refuses to know what is in the files, and to follow a name or a link to anywhere outside the directory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import UnusableFileError
from pipeline.sources import _common, _files
from pipeline.storage import stores

RELIST_SECONDS = 10  # between two listings of a changing local directory
UNLISTED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # errors of folders that are passed over and counted
NUM_LISTINGS = 64  # of remote directories in memory

Sizes = Mapping[str, int | None]  # of the files in a directory, by name -> bytes; None: unknown
Version = tuple[int, ...]  # of a file or directory; another one means another content


class Tree(Protocol):
    """A directory of files. A name has its subdirectories and slashes; a directory's is "" or ends with a slash."""

    def __hash__(self) -> int: ...

    def walk(self, skipped: list[str]) -> Iterator[tuple[str, Sizes]]:
        """Each directory with its files, sorted by name, and then those below it; hidden ones are left out.

        Args:
            skipped: gets the directories that may not be listed, and links to one that was listed before.
        """

    def exists(self, name: str) -> bool:
        """True for any file, also one that may not be read."""

    def may_read(self, name: str) -> bool:
        """True for a regular file inside the directory."""

    def list_files(self, folder: str) -> list[str]:
        """The names of all files in a directory, relative to it; none when it is gone."""

    def list_times(self, folder: str) -> Mapping[str, float]:
        """When each file of a directory last changed, and, as "", its list of files, in seconds since 1970; none in a
        store."""

    def find_version(self, name: str) -> Version: ...

    def open(self, name: str) -> BinaryIO: ...

    def read(self, name: str, *, limit: int) -> bytes:
        """The whole file.

        Raises:
            UnusableFileError: it is missing, outside, not a regular file, larger than `limit`, or may not be read.
            OSError, MachineError: the disk or the store failed, or the directory itself is gone.
        """


def open_tree(path: str, *, follow_links: bool) -> Tree:
    """
    Raises:
        ConfigError: there is no such directory.
    """
    if _files.is_url(path):
        return _RemoteTree(url=path.rstrip("/"))
    return _LocalTree(root=path, follow_links=follow_links)


@dataclass(frozen=True, kw_only=True)
class _LocalTree:
    root: str
    follow_links: bool  # wherever they lead

    def walk(self, skipped: list[str]) -> Iterator[tuple[str, Sizes]]:
        pending = [""]
        seen: set[tuple[int, int]] = set()  # devices and inodes
        while pending:
            folder = pending.pop()
            sizes: dict[str, int | None] = {}
            folders: list[str] = []
            try:
                status = Path(self.root, folder).stat()
                if self.follow_links and (status.st_dev, status.st_ino) in seen:
                    skipped.append(folder)
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(f"{self.root}/{folder}") as entries:
                    for entry in entries:
                        if entry.name[0] == ".":
                            continue
                        if _is_folder(entry, self.follow_links):
                            folders.append(entry.name)
                        else:
                            sizes[entry.name] = _find_size(entry)
            except OSError as error:
                if error.errno not in UNLISTED:
                    raise
                skipped.append(folder)
                continue
            yield folder, dict(sorted(sizes.items()))
            pending += [f"{folder}{name}/" for name in sorted(folders, reverse=True)]

    def exists(self, name: str) -> bool:
        return os.path.lexists(f"{self.root}/{name}")

    def may_read(self, name: str) -> bool:
        path = f"{self.root}/{name}"
        return Path(path).is_file() and (self.follow_links or _files.is_inside(path, self.root))

    def list_files(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(f"{self.root}/{folder}"))  # noqa: PTH208
        except OSError as error:
            if error.errno not in _files.UNREADABLE:
                raise
            return []

    def list_times(self, folder: str) -> Mapping[str, float]:
        place = f"{self.root}/{folder}"
        with os.scandir(place) as entries:
            times = {entry.name: time for entry in entries if (time := _find_time(entry)) is not None}
        return {"": Path(place).stat().st_mtime, **times}

    def find_version(self, name: str) -> Version:
        try:
            status = Path(self.root, name).stat()
        except OSError as error:
            if error.errno not in _files.UNREADABLE:
                raise
            return ()
        if name.endswith("/") or not name:
            return status.st_ino, int(status.st_mtime) // RELIST_SECONDS
        return status.st_mtime_ns, status.st_size

    def open(self, name: str) -> BinaryIO:
        return open(f"{self.root}/{name}", "rb")

    def read(self, name: str, *, limit: int) -> bytes:
        path = f"{self.root}/{name}"
        return _files.read_inside(path, self.root, limit=limit, follow_links=self.follow_links)


def _is_folder(entry: os.DirEntry[str], follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a link to itself
        return False


def _find_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere
        return None


def _find_time(entry: os.DirEntry[str]) -> float | None:
    try:
        return entry.stat().st_mtime
    except OSError:  # a link to nowhere
        return None


@dataclass(frozen=True, kw_only=True)
class _RemoteTree:
    """Listings are kept until the next walk, since every request takes long."""

    url: str

    def walk(self, skipped: list[str]) -> Iterator[tuple[str, Sizes]]:  # noqa: ARG002
        _list_remote.cache_clear()
        pending = [""]
        while pending:
            folder = pending.pop()
            listing = _list_remote(f"{self.url}/{folder}")
            yield folder, {name: size for name, size in listing.items() if name[-1] != "/" and name[0] != "."}
            folders = [name for name in listing if name[-1] == "/" and name[0] != "."]
            pending += [f"{folder}{name}" for name in reversed(folders)]

    def exists(self, name: str) -> bool:
        folder, slash, file = name.rpartition("/")
        return file in _list_remote(f"{self.url}/{folder}{slash}")

    def may_read(self, name: str) -> bool:
        return self.exists(name)

    def list_files(self, folder: str) -> list[str]:
        return [name for name in _list_remote(f"{self.url}/{folder}") if name[-1] != "/"]

    def list_times(self, folder: str) -> Mapping[str, float]:  # noqa: ARG002
        return {}

    def find_version(self, name: str) -> Version:
        folder, slash, file = name.rpartition("/")
        listing = _list_remote(f"{self.url}/{folder}{slash}")
        return len(listing), listing.get(file) or 0

    def open(self, name: str) -> BinaryIO:
        return stores.open_url(f"{self.url}/{name}")

    def read(self, name: str, *, limit: int) -> bytes:
        if name[:1] == "/" or ".." in name.split("/"):
            raise UnusableFileError(_files.OUTSIDE)
        folder, slash, file = name.rpartition("/")
        size = _list_remote(f"{self.url}/{folder}{slash}").get(file)
        if size is not None and (problem := _common.explain_size(size, limit)):
            raise UnusableFileError(problem)
        try:
            return stores.read_url(f"{self.url}/{name}")
        except FileNotFoundError as error:
            if not stores.list_folder(self.url):
                raise  # the store lost all of it
            raise UnusableFileError("it cannot be read: no such object") from error


@lru_cache(maxsize=NUM_LISTINGS)
def _list_remote(url: str) -> Sizes:
    return stores.list_folder(url)
