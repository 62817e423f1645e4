"""Payloads: files beside a table, such as the tars of packed images and the exported training set.

A payload takes the outputs of a stage, writes their bytes, and returns their rows. Its files are renamed into place
just before the table, whose footer has their names and sizes, so that missing or truncated files are noticed later.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.records import Image
from pipeline.storage.disk import make_folder, start_writing, sync_path
from pipeline.storage.layout import PACKED, unfinished_path, work_folder
from pipeline.storage.tables import TableFooter, open_atomic, read_whole_footer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BLOCK = 512  # bytes of a tar header
BUFFER = 1 << 16  # bytes
CHUNK = 1 << 24  # bytes that are written before the disk begins to
SUMS = "SHA256SUMS"  # file beside an export's tables with the digests of all exported files

MISSING = "is missing"  # the damage of a file that is not there


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """An image row, and its original bytes if they are to be packed; they are never re-encoded."""

    row: Image
    data: bytes | None

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id


class Written(int):
    """The size of a finished file in bytes, with the digest of what was written."""

    sha256: str  # hex

    def __new__(cls, num_bytes: int, sha256: str) -> Written:
        self = super().__new__(cls, num_bytes)
        self.sha256 = sha256
        return self


class HashedFile(io.FileIO):
    """A new file whose digest is computed as it is written, from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._digest = hashlib.sha256()
        self._num_bytes = self._num_started = 0

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data)
        num = super().write(view)
        self._digest.update(view[:num])
        self._num_bytes += num
        if self._num_bytes - self._num_started >= CHUNK:
            start_writing(self.fileno(), self._num_started, self._num_bytes - self._num_started)
            self._num_started = self._num_bytes
        return num

    def seekable(self) -> bool:
        return False

    @property
    def written(self) -> Written:
        return Written(self._num_bytes, self._digest.hexdigest())


class UnfinishedFile:
    """A file that is written outside its final folder; it is created when it is first opened."""

    def __init__(self, path: Path, *, work: Path) -> None:
        self.path = path
        self._temporary = unfinished_path(path, work=work)
        self._raw: HashedFile | None = None
        self._file: io.BufferedWriter | None = None

    def open(self) -> io.BufferedWriter:
        if self._file is None:
            for folder in (self.path.parent, self._temporary.parent):
                make_folder(folder)
            self._raw = HashedFile(self._temporary)
            self._file = io.BufferedWriter(self._raw, BUFFER)
        return self._file

    def commit(self) -> Written | None:
        """Puts the file in place and returns its size. If it was never opened, removes an earlier file."""
        if self._file is None or self._raw is None:
            self.path.unlink(missing_ok=True)
            return None
        self._file.flush()
        os.fsync(self._raw.fileno())
        written = self._raw.written
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_path(self.path.parent)
        return written

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class TarWriter:
    """Writes a tar without times or owners, so that equal members give equal bytes."""

    def __init__(self, file: UnfinishedFile) -> None:
        self.file, self.path = file, file.path
        self.end = 0  # the byte at which the next header begins

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        header, padding = info.tobuf(tarfile.USTAR_FORMAT), bytes(-len(data) % BLOCK)
        file, offset = self.file.open(), self.end + len(header)
        for part in (header, data, padding):  # not joined: that would copy the image
            file.write(part)
        self.end = offset + len(data) + len(padding)
        return offset

    def commit(self) -> Written | None:
        if self.end:
            size = self.end + 2 * BLOCK
            self.file.open().write(bytes(2 * BLOCK + -size % tarfile.RECORDSIZE))
        return self.file.commit()


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """A member of a tar."""

    name: str
    offset: int  # byte at which its data begins
    num_bytes: int

    @property
    def end(self) -> int:
        """The byte at which the member after it begins."""
        return self.offset + -(-self.num_bytes // BLOCK) * BLOCK


def list_members(tar: Path) -> Iterator[TarMember]:
    """The members of a tar that `TarWriter` wrote, from their headers alone."""
    with open(tar, "rb") as file:
        at = 0
        while (header := os.pread(file.fileno(), BLOCK, at)).strip(b"\0"):
            name, size = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)
            member = TarMember(name=name, offset=at + BLOCK, num_bytes=size)
            yield member
            at = member.end


@dataclass(frozen=True, kw_only=True, slots=True)
class LooseFile:
    """A file of a sample that no footer names: another file, which a footer does name, lists it."""

    path: Path
    key: str  # of the sample
    text: str | None = None  # the file's; None: it has the sample's image


class ImagePacker:
    """Packs the images of a shard into `shards/00000.tar`, for corpora that are not in tars."""

    def __init__(self, run: Path, shard: int) -> None:
        self._run = run
        self._tar = TarWriter(UnfinishedFile(run / PACKED / f"{shard:05d}.tar", work=work_folder(run, "image", shard)))

    def take(self, output: PackedImage) -> Image:
        if output.data is None:
            return output.row
        offset = self._tar.add(f"{output.row.key}.{file_extension(output.row.format)}", output.data)
        return replace(output.row, file=str(self._tar.file.path.relative_to(self._run)), offset=offset)

    def commit(self) -> Mapping[str, int]:
        return commit_files(self._run, self._tar)

    def abandon(self) -> None:
        self._tar.file.abandon()


def commit_files(run: Path, *files: TarWriter | UnfinishedFile) -> Mapping[str, int]:
    """Renames finished files into place; returns path relative to the run -> bytes, without empty files."""
    sizes = {str(file.path.relative_to(run)): file.commit() for file in files}
    return {name: size for name, size in sizes.items() if size}


def find_damage(run: Path, footer: TableFooter) -> str:
    """Describes the first payload file that is missing or has another size; "" if there is none."""
    for name, num_bytes in footer.payload.items():
        size, problem = measure_file(run / name)
        if problem:
            return f"{name} {problem}"
        if size != num_bytes:
            return f"{name} has {size} bytes and was written with {num_bytes}"
    return ""


def measure_file(path: Path) -> tuple[int, str]:
    """The size of a file in bytes, and why there is none; "" if there is one."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, MISSING
    if not stat.S_ISREG(about.st_mode):
        return 0, "is a directory" if stat.S_ISDIR(about.st_mode) else "is not a regular file"
    return about.st_size, ""


def read_intact_footer(run: Path, table: Path) -> TableFooter | None:
    """The footer of a whole table with all its payload files; None otherwise."""
    footer = read_whole_footer(table)
    return footer if footer is not None and not find_damage(run, footer) else None


def digest_payload(run: Path, payload: Mapping[str, int]) -> dict[str, str]:
    """The SHA-256 of each file that a payload put in place; what was not hashed as it was written is read."""
    return {name: size.sha256 if isinstance(size, Written) else hash_file(run / name) for name, size in payload.items()}


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(run: Path, folder: str, footers: Iterable[TableFooter], names: Iterable[str]) -> None:
    """Writes FOLDER/SHA256SUMS, as `sha256sum -c` reads it there.

    Args:
        folder: of the tables, relative to the run.
        footers: of the tables whose payload files are listed.
        names: further files to list, relative to the run.
    """
    digests = {name: digest for footer in footers for name, digest in footer.payload_sha256.items()}
    digests |= {name: hash_file(run / name) for name in names}
    with open_atomic(run / folder / SUMS) as file:
        file.writelines(f"{digests[name]}  {os.path.relpath(name, folder)}\n".encode() for name in sorted(digests))


def read_sums(run: Path, folder: str) -> dict[str, str]:
    """Path relative to the run -> SHA-256, hex; see `write_sums`.

    Raises:
        ValueError: the file is damaged.
    """
    return parse_sums((run / folder / SUMS).read_text(encoding="utf-8"), folder)


def parse_sums(text: str, folder: str) -> dict[str, str]:
    """As `read_sums`, from the file's text."""
    *lines, end = text.split("\n")
    matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if end or None in matches:
        raise ValueError("has lines that are no SHA-256 and path")
    names = Counter(os.path.normpath(f"{folder}/{match[2]}") for match in matches if match)
    if twice := [name for name, num in names.items() if num > 1]:
        raise ValueError(f"lists {twice[0]} more than once")
    return {name: match[1] for name, match in zip(names, matches, strict=True) if match}


def file_extension(format: str | None) -> str:
    """The usual file name extension of a Pillow format, without a dot."""
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(format or "", format or "bin")
