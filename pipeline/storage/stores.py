"""Remote file systems by URL, through fsspec: credentials come from their clients' own variables and files.

The errors of the clients, which share no type, become ours. They may repeat signed URLs to which a store redirected;
no message of ours does.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pipeline.errors import ConfigError, MachineError, UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

BUFFER_BYTES = 1 << 20  # asked of a client at a time
MAX_MESSAGE = 300  # characters of a client's error
EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hf"}  # protocol -> our extra with its client
SIGNED = re.compile(r"(https?://)(?:[^/\s@?'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")\]>]*)?")


def hide_credentials(text: str) -> str:
    """A text with web addresses, without their passwords and queries.

    >>> hide_credentials("403: https://me:pw@host/a.tar?sig=x")
    '403: https://host/a.tar'
    """
    return SIGNED.sub(r"\1\2", text)


def connect(url: str, *, field: str = "source.path") -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        ConfigError: no installed package opens such URLs.
    """
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ValueError, ImportError) as error:
        extra = EXTRAS.get(url.partition("://")[0])
        advice = f"; pip install '.[{extra}]' in a clone of recap" if extra and isinstance(error, ImportError) else ""
        raise ConfigError(field, f"{url!r} cannot be opened: {error}{advice}") from error


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raises what a client raises as a MachineError, or as a FileNotFoundError, without credentials."""
    try:
        yield
    except (MachineError, UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file or object", url) from None
    except Exception as error:  # botocore, aiohttp, google-auth and others have no common type
        why = hide_credentials(" ".join(str(error).split()))[:MAX_MESSAGE]
        raise MachineError(f"{url}: {type(error).__name__}: {why}") from None


def list_folder(url: str) -> dict[str, int | None]:
    """The names directly below a URL -> bytes; a directory's name ends with a slash. Empty when there is nothing."""
    with translate_errors(url):
        filesystem, path = connect(url)
        path = path.rstrip("/")
        filesystem.invalidate_cache(path)
        try:
            entries = filesystem.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    names: dict[str, int | None] = {}
    for entry in entries:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if name and entry["name"].strip("/") != path.strip("/"):  # a store may list the directory's own marker
            is_folder = entry["type"] == "directory"
            names[f"{name}/" if is_folder else name] = None if is_folder else entry.get("size")
    return dict(sorted(names.items()))


def require_bucket(url: str) -> None:
    """
    Raises:
        ConfigError: no installed package opens such URLs.
        MachineError: the store does not answer, does not let us in, or has no such bucket.
    """
    from fsspec.implementations.local import LocalFileSystem

    filesystem, path = connect(url, field="url")
    with translate_errors(url):
        bucket = path.lstrip("/").partition("/")[0]
        if url.partition("://")[0] in EXTRAS and not filesystem.exists(bucket):
            raise MachineError(f"{url}: there is no bucket {bucket!r}; make it, or correct the name")
        if isinstance(filesystem, LocalFileSystem):
            above = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
            if not (above.is_dir() and os.access(above, os.W_OK)):
                raise MachineError(f"{url}: {above} is no folder that may be written to")


def find_files(url: str) -> Iterator[tuple[str, int | None]]:
    """The URLs and sizes of the files that a glob matches, or of those below a directory, in order."""
    with translate_errors(url):
        filesystem, path = connect(url)
        filesystem.invalidate_cache()
        pattern = path if glob.has_magic(path) else f"{path.rstrip('/')}/**"
        found = sorted(filesystem.glob(pattern, detail=True).items())
    for name, about in found:
        if about["type"] == "file":
            yield filesystem.unstrip_protocol(name), about.get("size")


def open_url(url: str) -> BinaryIO:
    """Opens a remote file for reading.

    Raises:
        FileNotFoundError: it does not exist.
        MachineError: the store failed; reading raises it too.
    """
    with translate_errors(url):
        filesystem, path = connect(url)
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(filesystem.open(path, "rb"), url), BUFFER_BYTES))


def read_url(url: str) -> bytes:
    """The bytes of a remote file; raises the errors of `open_url`."""
    with translate_errors(url):
        filesystem, path = connect(url)
        return cast(bytes, filesystem.cat_file(path))


def list_tree(url: str) -> dict[str, int]:
    """The names of all files below a URL, relative to it -> bytes."""
    with translate_errors(url):
        filesystem, path = connect(url)
        filesystem.invalidate_cache()
        found = filesystem.find(path, detail=True)
    return {name.removeprefix(path).lstrip("/"): about["size"] for name, about in sorted(found.items())}


def download_file(url: str, file: Path) -> None:
    """Copies a remote file to a local one, whose directory is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with translate_errors(url):
        filesystem, path = connect(url)
        filesystem.get_file(path, str(file))


def remove_file(url: str) -> None:
    """Removes a remote file, if there is one."""
    with translate_errors(url), suppress(FileNotFoundError):
        filesystem, path = connect(url)
        filesystem.rm_file(path)


class _RemoteFile(io.RawIOBase):
    """A client's file, with its errors translated."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        with translate_errors(self._url):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with translate_errors(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def upload_file(file: Path, url: str) -> None:
    """Writes a remote file that appears complete, or not at all.

    Raises:
        MachineError: the store failed.
    """
    with translate_errors(url):
        filesystem, path = connect(url, field="export.url")
        try:
            target = filesystem.open(path, "wb", autocommit=False)
        except FileNotFoundError:  # of a file system with directories
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            target = filesystem.open(path, "wb", autocommit=False)
        with ExitStack() as undo, file.open("rb") as source:
            undo.callback(target.discard)  # parts of an upload cost money until they are removed
            shutil.copyfileobj(source, target, BUFFER_BYTES)
            target.close()
            target.commit()
            undo.pop_all()
