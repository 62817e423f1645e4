"""Decides how a tar becomes samples: fetched and unpacked where it must be, grouped by name, its image found.

A sample is what lies side by side under one path up to the first dot of the file name, as webdataset has it. It
refuses to know what images, alt text and metadata are (`_common`), and how a tar is laid out
(`_tar_format`).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

from pipeline.records import Raw
from pipeline.sources import _common, _files, _tar_format

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COPY_BYTES = 1 << 20  # moved at a time when a tar is staged
NO_FILE = _tar_format.Member(name="", offset=0, size=0, error="there is no image in the sample")
SCRATCH_HELP = "the folder in which remote and compressed tars wait while they are read; empty: the system's"
MAX_TAR_HELP = "a compressed tar that unpacks to more bytes than this is cut off there"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Members side by side that share a key."""

    key: str  # the path up to the first dot of the file name
    members: dict[str, _tar_format.Member] = field(default_factory=dict)  # by what comes after that dot, in lower case
    error: str | None = None  # this is no sample, but a stretch of the tar that cannot be read

    def twice(self) -> Sample:
        """The same, beside another with a member of the same name: which of them is meant, nobody knows."""
        twice = {name: replace(member, error="another member has its name") for name, member in self.members.items()}
        return replace(self, members=twice)

    def image(self, wanted: str) -> _tar_format.Member:
        """The member that is the image: the one named, or the first that is called an image."""
        if wanted:
            return self.members.get(wanted, replace(NO_FILE, error=f"there is no {wanted} in the sample"))
        plain = (member for extension, member in self.members.items() if extension in _common.IMAGES)
        named = (member for extension, member in self.members.items() if _common.is_image(f".{extension}"))
        return next(plain, next(named, NO_FILE))


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar that is open and can be read anywhere."""

    name: str  # the last part of its path
    stream: BinaryIO
    file: str | None  # where the same bytes lie on disk, when they do
    error: str | None = None  # why there is no more of it than this

    def samples(self) -> Iterator[Sample]:
        """All samples in order, read from the headers alone; damaged stretches stand between them."""
        sample: Sample | None = None
        for one in filter(None, map(self._alone, _tar_format.members(self.stream))):
            if sample is not None and one.key == sample.key and not one.members.keys() & sample.members.keys():
                sample.members.update(one.members)
                continue
            if sample is not None:
                yield sample
                one = one.twice() if one.key == sample.key else one
            sample = one
        if sample is not None:
            yield sample

    def _alone(self, member: _tar_format.Member) -> Sample | None:
        """The member as a sample of its own; None when it is hidden."""
        if not member.name:
            because = "; ".join(error for error in (member.error, self.error) if error)
            return Sample(key=f"{self.name}@{member.offset}", error=because)
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        return Sample(key=folder + slash + stem, members={extension.lower(): member}) if stem else None

    def image(self, sample: Sample, wanted: str = "") -> Raw:
        """The sample's image: its bytes and where they lie, or why there are none."""
        member = sample.image(wanted)
        error = sample.error or member.error
        if error is None and member.size > _common.MAX_IMAGE_BYTES:
            error = f"its {member.size} bytes are more than the {_common.MAX_IMAGE_BYTES} that one may have"
        if error is not None:
            return Raw(source_key=sample.key, data=None, error=error)
        offset = member.offset if self.file else None
        return Raw(source_key=sample.key, data=self.data(member), file=self.file, offset=offset)

    def raw(self, sample: Sample, *, wanted: str = "", column: str = "") -> Raw:
        """The sample: its image, `wanted` or the first, and its words, alt text from `column` or its usual place."""
        texts = {}
        for name in dict.fromkeys((*_common.TEXTS, column)):
            if (member := sample.members.get(name)) and member.error is None and name != "json":
                texts[name] = _common.text(self.data(member, _common.MAX_TEXT_BYTES))
        about = sample.members.get("json", NO_FILE)
        fields = _common.from_json(self.data(about, _common.MAX_TEXT_BYTES)) if about.error is None else {}
        return _common.describe(self.image(sample, wanted), fields, texts=texts, column=column)

    def data(self, member: _tar_format.Member, most: int = _common.MAX_IMAGE_BYTES) -> bytes:
        self.stream.seek(member.offset)
        return self.stream.read(min(member.size, most))


@contextmanager
def opened(file: str, *, scratch: str, max_bytes: int) -> Iterator[Tar]:
    """A tar as it lies on disk when it is local and plain, otherwise a scratch copy that goes when it is closed.

    The copy has no name, so that nothing stays behind, however the process ends.

    Args:
        file: an absolute path or a URL.
        scratch: the folder for the copy; "" is the system's.
        max_bytes: a compressed tar is unpacked up to here.

    Raises:
        OSError: the tar cannot be opened or fetched, or the scratch folder is full.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(_files.opened(file))
        local = not _files.is_url(file)
        if not local:
            stream = stack.enter_context(_copied(stream, scratch))
        unpack = _unpacker(stream)
        tar = Tar(name=file.rpartition("/")[2], stream=stream, file=file if local and unpack is None else None)
        if unpack is not None:
            copy = stack.enter_context(_temporary(scratch))
            tar = replace(tar, stream=copy, error=_unpack(unpack(stream), copy, max_bytes))
        yield tar


def _temporary(scratch: str) -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile(dir=scratch or None))


def _copied(stream: BinaryIO, scratch: str) -> BinaryIO:
    copy = _temporary(scratch)
    shutil.copyfileobj(stream, copy, COPY_BYTES)
    copy.seek(0)
    return copy


def _unpacker(stream: BinaryIO) -> Callable[[BinaryIO], Any] | None:
    """What reads the stream unpacked, by its first bytes: names lie. None when it is not compressed."""
    magics: dict[bytes, Callable[[BinaryIO], Any]] = {
        b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ\0": lzma.LZMAFile,
        b"\x28\xb5\x2f\xfd": _zstd,
    }
    first = stream.read(6)
    stream.seek(0)
    return next((unpack for magic, unpack in magics.items() if first.startswith(magic)), None)


def _zstd(stream: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


def _unpack(packed: Any, to: BinaryIO, max_bytes: int) -> str | None:
    """Writes what the stream unpacks to; returns what was wrong with it."""
    while True:
        try:
            data = packed.read(COPY_BYTES)
        except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's word; decoders give no number
            return f"it cannot be unpacked: {error}"
        if not data:
            return None
        if to.tell() + len(data) > max_bytes:
            return f"it unpacks to more than {max_bytes} bytes"
        to.write(data)
