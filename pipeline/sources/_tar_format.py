"""Tar headers: the name of every member, the byte at which its data begins, and which members cannot be trusted.

Written by hand because `tarfile` stops at the first damaged header. It refuses to extract, so a name is never a path
here, and knows nothing of images or samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
MAX_HEADER_BYTES = 1 << 20  # of a pax or GNU header that holds a long name
SCAN_BYTES = 1 << 20  # read at a time when looking for the next header
MAGIC_AT = 257  # byte of a header at which "ustar" begins
ZERO = bytes(BLOCK)
REGULAR, FOLDER, LONG_NAME, PAX = b"0\0" + b"7", b"5", b"L", b"x"
IGNORED = b"KgDVM"  # long link names, global pax headers, dumps, volume labels: no samples
SPECIAL = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member that is not a directory; or, without a name, a range of the tar that cannot be read."""

    name: str  # as the tar has it; bytes that are not UTF-8 become \\xNN
    offset: int  # byte at which its data begins
    size: int  # bytes
    error: str | None = None  # why its data cannot be used


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    name: bytes
    size: int
    type: bytes
    link: bytes


def read_members(tar: BinaryIO) -> Iterator[Member]:
    """The members of an uncompressed tar, in order, from the headers alone.

    A damaged range is one nameless member with an error; reading resumes at the next valid header. The caller may move
    `tar`'s position between two members.
    """
    end, at, has_end_mark = tar.seek(0, os.SEEK_END), 0, False
    extensions: dict[str, bytes] = {}  # from extension headers, for the next member
    while at < end and len(block := _read_bytes(tar, at, BLOCK)) == BLOCK:
        header = None if block == ZERO else _parse_header(block)
        if header is None:
            has_end_mark = block == ZERO
            following = _find_header(tar, at + BLOCK)
            if not has_end_mark:
                yield _make_damage(at, "is not a tar" if at == 0 and following is None else "is damaged")
            if following is None:
                return
            at = following
        elif header.type in (LONG_NAME, PAX) and header.size <= MAX_HEADER_BYTES:
            extensions |= _parse_extension(header.type, _read_bytes(tar, at + BLOCK, header.size))
            at = _skip_data(at, header.size)
        elif header.type in IGNORED or header.type in (LONG_NAME, PAX):
            at = _skip_data(at, header.size)
        else:
            member, num_stored = _make_member(header, extensions, at + BLOCK)
            extensions, has_end_mark = {}, False
            is_cut = member.offset + num_stored > end
            if is_cut:
                member = replace(member, error=f"the tar has {end - member.offset} of its {num_stored} bytes")
            if header.type != FOLDER and not member.name.endswith("/"):
                yield member
            # When the data would end beyond the tar, the size is false or the tar is cut off: search from here.
            at = (_find_header(tar, at + BLOCK) or end) if is_cut else _skip_data(at, num_stored)
    if not has_end_mark:
        yield _make_damage(min(at, end), "is cut off: its end mark is missing")


def is_header(block: bytes) -> bool:
    """True for the first block of an uncompressed tar with members."""
    return len(block) == BLOCK and block != ZERO and _parse_header(block) is not None


def _make_damage(at: int, problem: str) -> Member:
    return Member(name="", offset=at, size=0, error=f"the tar {problem} at byte {at}")


def _read_bytes(tar: BinaryIO, at: int, size: int) -> bytes:
    tar.seek(at)
    return tar.read(size)


def _skip_data(at: int, size: int) -> int:
    """The byte at which the header after the one at `at` begins."""
    return at + BLOCK + -(-size // BLOCK) * BLOCK


def _parse_header(block: bytes) -> _Header | None:
    """A header, or None when its checksum or a number in it is wrong."""
    size, checksum = _parse_number(block[124:136]), _parse_number(block[148:156])
    if size is None or checksum != sum(block[:148]) + 8 * 0x20 + sum(block[156:]):
        return None
    name = _parse_text(block[:100])
    prefix = _parse_text(block[345:500]) if block[MAGIC_AT : MAGIC_AT + 6] == b"ustar\0" else b""
    return _Header(name=prefix + b"/" + name if prefix else name, size=size, type=block[156:157], link=block[157:257])


def _parse_text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _parse_number(field: bytes) -> int | None:
    """Octal digits or, when they do not fit, base 256 behind a set first bit; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _parse_text(field).strip()
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _parse_extension(type: bytes, data: bytes) -> dict[str, bytes]:
    """The fields that a GNU long name or a pax header sets; pax records read "LENGTH KEY=VALUE\\n"."""
    if type == LONG_NAME:
        return {"path": _parse_text(data)}
    fields: dict[str, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,9}", length) or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key.decode("utf-8", "backslashreplace")] = value
        data = data[int(length) :]
    return fields


def _make_member(header: _Header, extensions: dict[str, bytes], offset: int) -> tuple[Member, int]:
    """The member behind a header, and the number of bytes of data that the tar holds for it."""
    raw = extensions.get("path", header.name)
    size = int(extensions["size"]) if re.fullmatch(rb"[0-9]{1,19}", extensions.get("size", b"")) else header.size
    name = raw.decode("utf-8", "backslashreplace") or "(no name)"
    error = "its name leads out of the folder" if name.startswith("/") or ".." in name.split("/") else None
    if header.type == b"S" or any(key.startswith("GNU.sparse") for key in extensions):
        error = "is a sparse file"
    elif header.type not in REGULAR:
        target = _parse_text(header.link).decode("utf-8", "backslashreplace")
        error = f"is {SPECIAL.get(header.type, f'of the unknown type {header.type!r}')}" + (target and f" to {target}")
    num_stored = 0 if header.type in SPECIAL or header.type == FOLDER else size
    return Member(name=name, offset=offset, size=size, error=error), num_stored


def _find_header(tar: BinaryIO, at: int) -> int | None:
    """The first byte from `at` on at which a valid header begins."""
    while chunk := _read_bytes(tar, at, SCAN_BYTES):
        magic = chunk.find(b"ustar")
        while magic >= 0:
            start = magic - MAGIC_AT
            if start >= 0 and start % BLOCK == 0 and _parse_header(chunk[start : start + BLOCK].ljust(BLOCK, b"\0")):
                return at + start
            magic = chunk.find(b"ustar", magic + 1)
        at += SCAN_BYTES
    return None
