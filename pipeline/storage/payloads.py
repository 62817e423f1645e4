"""Payloads: files beside a table, such as the tars of packed images and the exported training set.

A payload takes the outputs of a stage, writes their bytes, and returns their rows. Its files are renamed into place
just before the table, whose footer has their names and sizes, so that missing or truncated files are noticed later.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.records import Image
from pipeline.storage.layout import PACKED, unfinished_path, work_folder
from pipeline.storage.tables import TableFooter, make_folder, open_atomic, read_whole_footer, sync_path

BLOCK = 512  # bytes of a tar header
SUMS = "SHA256SUMS"  # file beside an export's tables with the digests of all exported files


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """An image row, and its original bytes if they are to be packed; they are never re-encoded."""

    row: Image
    data: bytes | None

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id


class UnfinishedFile:
    """A file that is written outside its final folder; it is created when it is first opened."""

    def __init__(self, path: Path, *, work: Path) -> None:
        self.path = path
        self._temporary = unfinished_path(path, work=work)
        self._file: io.BufferedWriter | None = None

    def open(self) -> io.BufferedWriter:
        if self._file is None:
            for folder in (self.path.parent, self._temporary.parent):
                make_folder(folder)
            self._file = open(self._temporary, "xb")
        return self._file

    def commit(self) -> int:
        """Puts the file in place and returns its size in bytes. If it was never opened, removes an earlier file."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        num_bytes = os.fstat(self._file.fileno()).st_size
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_path(self.path.parent)
        return num_bytes

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class TarWriter:
    """Writes a tar without times or owners, so that equal members give equal bytes."""

    def __init__(self, file: UnfinishedFile) -> None:
        self.file, self.path = file, file.path
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        if self._tar is None:
            self._tar = tarfile.open(fileobj=self.file.open(), mode="w", format=tarfile.USTAR_FORMAT)
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        offset = self._tar.offset + BLOCK
        self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # otherwise every member's header stays in memory
        return offset

    @property
    def end(self) -> int:
        """The byte at which the next header begins."""
        return 0 if self._tar is None else int(self._tar.offset)

    def commit(self) -> int:
        if self._tar is not None:
            self._tar.close()
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
    return {name: num_bytes for name, num_bytes in sizes.items() if num_bytes}


def find_damage(run: Path, footer: TableFooter) -> str:
    """Describes the first payload file that is missing or has another size; "" if there is none."""
    for name, num_bytes in footer.payload.items():
        try:
            size = (run / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != num_bytes:
            return f"{name} has {size} bytes and was written with {num_bytes}"
    return ""


def read_intact_footer(run: Path, table: Path) -> TableFooter | None:
    """The footer of a whole table with all its payload files; None otherwise."""
    footer = read_whole_footer(table)
    return footer if footer is not None and not find_damage(run, footer) else None


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
    return {os.path.normpath(f"{folder}/{match[2]}"): match[1] for match in matches if match}


def file_extension(format: str | None) -> str:
    """The usual file name extension of a Pillow format, without a dot."""
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(format or "", format or "bin")
