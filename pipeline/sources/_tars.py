"""Tars as samples: fetched and unpacked where needed, grouped by name, each with its image.

A sample is the adjacent members that share a key: the path up to the first dot of the file name, as in webdataset, or
up to the last. It refuses to know what images, alt text and metadata are (`_common`), and how a tar is laid out
(`_tar_format`).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, Literal, cast

from pipeline import machine
from pipeline.records import NOT_TAKEN, Raw
from pipeline.sources import _common, _files, _tar_format

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COPY_BYTES = 1 << 20  # moved at a time when a tar is staged
SplitAt = Literal["first", "last"]
NOT_TAKEN_ERROR = (
    f"{NOT_TAKEN}: set source.image to the extension to take or, when file names contain dots,"
    ' source.split_keys = "last"'
)
NO_FILE = _tar_format.Member(name="", offset=0, size=0, error="there is no image in the sample")
SCRATCH_HELP = "the folder for copies of remote and compressed tars while they are read; empty: the system's"
MAX_TAR_HELP = "a compressed tar that unpacks to more bytes than this is cut off there"


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """Adjacent members that share a key."""

    key: str  # the path up to the first or last dot of the file name
    members: dict[str, _tar_format.Member] = field(default_factory=dict)  # by what comes after that dot, in lower case
    error: str | None = None  # this is not a sample, but a range of the tar or an image that cannot be used

    def mark_ambiguous(self) -> TarSample:
        """The sample without usable members, since the one before it has a member of the same name."""
        members = {name: replace(member, error="another member has its name") for name, member in self.members.items()}
        return replace(self, members=members)

    def find_image(self, extension: str) -> _tar_format.Member:
        """The member with the extension or, for "", the first that has an image's."""
        if extension:
            return self.members.get(extension, replace(NO_FILE, error=f"there is no {extension} in the sample"))
        exact = (member for name, member in self.members.items() if name in _common.IMAGES)
        last = (member for name, member in self.members.items() if _common.is_image(f".{name}"))
        return next(exact, next(last, NO_FILE))

    def list_other_images(self) -> Iterator[TarSample]:
        """The images that `find_image` leaves when no extension is given, as samples with an error."""
        taken = self.find_image("")
        for name, member in self.members.items():
            if member is not taken and member.error is None and _common.is_image(f".{name}"):
                yield TarSample(key=member.name, error=NOT_TAKEN_ERROR)


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar that is open for random reads."""

    name: str  # the last part of its path
    stream: BinaryIO
    file: str | None  # path of the same bytes on disk; None for a scratch copy
    error: str | None = None  # why it ends early

    def list_samples(self, split_at: SplitAt = "first") -> Iterator[TarSample]:
        """All samples in order, from the headers alone, with damaged ranges between them.

        Args:
            split_at: the dot of a file name at which its key ends.
        """
        sample: TarSample | None = None
        for one in filter(None, (self._make_sample(m, split_at) for m in _tar_format.read_members(self.stream))):
            if sample is not None and one.key == sample.key and not one.members.keys() & sample.members.keys():
                sample.members.update(one.members)
                continue
            if sample is not None:
                yield sample
                one = one.mark_ambiguous() if one.key == sample.key else one
            sample = one
        if sample is not None:
            yield sample

    def _make_sample(self, member: _tar_format.Member, split_at: SplitAt) -> TarSample | None:
        """A sample of one member; None when the member is hidden."""
        if not member.name:
            error = "; ".join(error for error in (member.error, self.error) if error)
            return TarSample(key=f"{self.name}@{member.offset}", error=error)
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if stem and extension and split_at == "last":
            stem, _, extension = name.rpartition(".")
        return TarSample(key=folder + slash + stem, members={extension.lower(): member}) if stem else None

    def read_image(self, sample: TarSample, extension: str = "") -> Raw:
        """The sample's image, with its place in the tar, or the error why there is none."""
        member = sample.find_image(extension)
        error = sample.error or member.error or _common.explain_size(member.size, _common.MAX_IMAGE_BYTES)
        if error is not None:
            return Raw(source_key=sample.key, data=None, error=error)
        offset = member.offset if self.file else None
        return Raw(source_key=sample.key, data=self._read_data(member), file=self.file, offset=offset)

    def read_sample(self, sample: TarSample, *, extension: str = "", column: str = "") -> Raw:
        """The sample: its image as in `read_image`, alt text from `column` or the usual names, and metadata."""
        files = {}
        for name in dict.fromkeys((*_common.TEXTS, column)):
            if (member := sample.members.get(name)) and member.error is None and name != "json":
                files[name] = self._read_data(member, _common.MAX_TEXT_BYTES)
        json = sample.members.get("json", NO_FILE)
        fields = _common.parse_json(self._read_data(json, _common.MAX_TEXT_BYTES)) if json.error is None else {}
        return _common.add_text(self.read_image(sample, extension), fields, files=files, column=column)

    def _read_data(self, member: _tar_format.Member, limit: int = _common.MAX_IMAGE_BYTES) -> bytes:
        self.stream.seek(member.offset)
        return self.stream.read(min(member.size, limit))


def is_plain(file: str) -> bool:
    """True for a tar that is neither remote nor, by its name, compressed: it is read where it is."""
    return file.endswith(".tar") and not _files.is_url(file)


@contextmanager
def open_tar(file: str, *, scratch: str, max_bytes: int) -> Iterator[Tar]:
    """Opens a plain local tar where it is, and any other as a scratch copy.

    The copy has no name, so it vanishes however the process ends.

    Args:
        file: an absolute path or a URL.
        scratch: the directory for the copy; "" is the system's.
        max_bytes: limit of a compressed tar's unpacked size.

    Raises:
        OSError: the tar cannot be opened or fetched, or the scratch directory is full.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(_files.open_file(file))
        is_local = not _files.is_url(file)
        if not is_local:
            copy = stack.enter_context(_open_scratch(scratch))
            shutil.copyfileobj(stream, copy, COPY_BYTES)
            copy.seek(0)
            stream = copy
        open_unpacked = _choose_decoder(stream)
        name = file.rpartition("/")[2]
        if open_unpacked is None:
            yield Tar(name=name, stream=stream, file=file if is_local else None)
        else:
            copy = stack.enter_context(_open_scratch(scratch))
            packed = open_unpacked(stream)
            error = _unpack_stream(packed, copy, max_bytes, step=COPY_BYTES)
            if error:  # again in small steps, since a decoder that fails drops what it unpacked in the same step
                stream.seek(0)
                copy.seek(0)
                again = open_unpacked(stream)  # beside the first, since Arrow's decoders close the file when they go
                error = _unpack_stream(again, copy, max_bytes, step=_tar_format.BLOCK)
                if error:
                    machine.check_memory(f"{name}: {error}")
            yield Tar(name=name, stream=copy, file=None, error=error)


def _open_scratch(scratch: str) -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile(dir=scratch or None))


def _choose_decoder(stream: BinaryIO) -> Callable[[BinaryIO], Any] | None:
    """Opens the unpacked stream, by the first bytes, since names may be wrong; None when it is not compressed."""
    decoders: dict[bytes, Callable[[BinaryIO], Any]] = {
        rb"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
        rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.BZ2File,
        rb"\xfd7zXZ\0|\x5d\0\0": lzma.LZMAFile,  # xz, and the older lzma
        rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": partial(_open_arrow, codec="zstd"),  # or a frame to be skipped
        rb"\x04\x22\x4d\x18": partial(_open_arrow, codec="lz4"),
    }
    first = stream.read(_tar_format.BLOCK)
    stream.seek(0)
    if _tar_format.is_header(first):  # a member's name may look like a packing
        return None
    return next((decoder for magic, decoder in decoders.items() if re.match(magic, first)), None)


def _open_arrow(stream: BinaryIO, *, codec: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)


def _unpack_stream(packed: Any, output: BinaryIO, max_bytes: int, *, step: int) -> str | None:
    """Writes the unpacked bytes, at most `step` at a time; returns the error that ended them early."""
    while True:
        try:
            data = packed.read1(step)
        except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(machine.find_trouble(error), OSError):
                raise  # from the disk
            return f"it cannot be unpacked: {error}"
        if not data:
            return None
        if output.tell() + len(data) > max_bytes:
            return f"it unpacks to more than {max_bytes} bytes"
        output.write(data)
