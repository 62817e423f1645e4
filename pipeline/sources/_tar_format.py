"""Decides what is in a tar: the name of every member, the byte at which its data begins, and what cannot be trusted.

It refuses to extract: a name is never a path here. It knows nothing of images or samples.
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
MAGIC_AT = 257  # byte of a header at which "ustar" stands
ZERO = bytes(BLOCK)
REGULAR, FOLDER, LONG_NAME, PAX = b"0\0" + b"7", b"5", b"L", b"x"
PASSED_OVER = b"KgDVM"  # long link names, global pax headers, dumps, volume labels: no samples
STRANGE = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member that is no folder; or, without a name, a stretch of the tar that cannot be read."""

    name: str  # as the tar has it; bytes that are not UTF-8 become \\xNN
    offset: int  # byte at which its data begins
    size: int  # bytes
    error: str | None = None  # why its data is not to be used


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    name: bytes
    size: int
    type: bytes
    link: bytes


def members(tar: BinaryIO) -> Iterator[Member]:
    """The members of an uncompressed tar, in order, by their headers alone.

    A damaged stretch is one nameless member with an error; after it comes the next header that can be read. The
    caller may move `tar`'s position between two members.
    """
    end, at, ended = tar.seek(0, os.SEEK_END), 0, False
    given: dict[str, bytes] = {}  # by an extension header, for the member after it
    while at < end and len(block := _read(tar, at, BLOCK)) == BLOCK:
        header = None if block == ZERO else _parse(block)
        if header is None:
            ended = block == ZERO
            found = _next_header(tar, at + BLOCK)
            if not ended:
                yield _damage(at, "is no tar" if at == 0 and found is None else "is damaged")
            if found is None:
                return
            at = found
        elif header.type in (LONG_NAME, PAX) and header.size <= MAX_HEADER_BYTES:
            given |= _extension(header.type, _read(tar, at + BLOCK, header.size))
            at = _after(at, header.size)
        elif header.type in PASSED_OVER or header.type in (LONG_NAME, PAX):
            at = _after(at, header.size)
        else:
            member, stored = _member(header, given, at + BLOCK)
            given, ended = {}, False
            cut = member.offset + stored > end
            if cut:
                member = replace(member, error=f"the tar has {end - member.offset} of its {stored} bytes")
            if header.type != FOLDER and not member.name.endswith("/"):
                yield member
            # A size that reaches beyond the end is a lie, or the tar is cut off: look for members, trusting nothing.
            at = (_next_header(tar, at + BLOCK) or end) if cut else _after(at, stored)
    if not ended:
        yield _damage(min(at, end), "is cut off: its end mark is missing")


def _damage(at: int, what: str) -> Member:
    return Member(name="", offset=at, size=0, error=f"the tar {what} at byte {at}")


def _read(tar: BinaryIO, at: int, size: int) -> bytes:
    tar.seek(at)
    return tar.read(size)


def _after(at: int, size: int) -> int:
    """Where the header after the one at `at` begins."""
    return at + BLOCK + -(-size // BLOCK) * BLOCK


def _parse(block: bytes) -> _Header | None:
    """A header, or None when its checksum or a number in it is wrong."""
    size, checksum = _number(block[124:136]), _number(block[148:156])
    if size is None or checksum != sum(block[:148]) + 8 * 0x20 + sum(block[156:]):
        return None
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[MAGIC_AT : MAGIC_AT + 6] == b"ustar\0" else b""
    return _Header(name=prefix + b"/" + name if prefix else name, size=size, type=block[156:157], link=block[157:257])


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """Octal digits or, when they do not fit, base 256 behind a set first bit; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip()
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _extension(type: bytes, data: bytes) -> dict[str, bytes]:
    """What a GNU long name or a pax header says of the next member; pax records read "LENGTH KEY=VALUE\\n"."""
    if type == LONG_NAME:
        return {"path": _text(data)}
    found: dict[str, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,9}", length) or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "backslashreplace")] = value
        data = data[int(length) :]
    return found


def _member(header: _Header, given: dict[str, bytes], offset: int) -> tuple[Member, int]:
    """The member behind a header, and how many bytes of data the tar holds for it."""
    raw = given.get("path", header.name)
    size = int(given["size"]) if re.fullmatch(rb"[0-9]{1,19}", given.get("size", b"")) else header.size
    regular = header.type in REGULAR
    sparse = header.type == b"S" or any(key.startswith("GNU.sparse") for key in given)
    name = raw.decode("utf-8", "backslashreplace") or "(no name)"
    error = "its name leads out of the folder" if name.startswith("/") or ".." in name.split("/") else None
    if sparse:
        error = "is a sparse file"
    elif not regular:
        target = _text(header.link).decode("utf-8", "backslashreplace")
        error = f"is {STRANGE.get(header.type, f'of the unknown type {header.type!r}')}" + (target and f" to {target}")
    stored = 0 if header.type in STRANGE or header.type == FOLDER else size
    return Member(name=name, offset=offset, size=size, error=error), stored


def _next_header(tar: BinaryIO, at: int) -> int | None:
    """The first byte from `at` on at which a header stands that can be read."""
    while chunk := _read(tar, at, SCAN_BYTES):
        magic = chunk.find(b"ustar")
        while magic >= 0:
            start = magic - MAGIC_AT
            if start >= 0 and start % BLOCK == 0 and _parse(chunk[start : start + BLOCK].ljust(BLOCK, b"\0")):
                return at + start
            magic = chunk.find(b"ustar", magic + 1)
        at += SCAN_BYTES
    return None
