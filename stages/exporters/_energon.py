"""Indexes of Megatron-Energon: what makes a folder of tars a dataset without `energon prepare`.

`.nv-meta` has the tars with their numbers of samples, their splits, the type of a sample, and the place of every
member; beside each tar, `.tar.idx` has the bytes at which its samples begin. The layout is that of Energon 7.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pipeline.storage.payloads import BLOCK, TarMember, TarWriter, UnfinishedFile, list_members
from pipeline.storage.tables import place_atomic
from stages.exporters import FormFile, put_text

META = ".nv-meta"
OFFSET = struct.Struct("<Q")  # of a sample, in a .tar.idx
INDEXES = tuple(f"{META}/{name}" for name in (".info.json", "split.yaml", "dataset.yaml", "index.sqlite", "index.uuid"))
CAPTIONS = """\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: {image}
  caption: txt
"""
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, "
    "sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, "
    "content_byte_offset INTEGER, content_byte_size INTEGER)",
)
KEYS = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, "
    "content_byte_size)",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedSample:
    """A sample of a tar."""

    tar: int  # the tar's place in the list of tars
    index: int  # within the tar, from 0
    key: str
    parts: tuple[TarMember, ...]  # in the tar's order, at least one


class IndexedTar:
    """A tar that is being written, and its `.tar.idx`: where each sample begins, and where the last one ends."""

    def __init__(self, path: Path, *, work: Path) -> None:
        self._tar = TarWriter(UnfinishedFile(path, work=work))
        self._index = UnfinishedFile(path.with_suffix(".tar.idx"), work=work)
        self._end = 0

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends a sample: extension -> file."""
        offsets = [self._tar.add(f"{key}.{name}", data) for name, data in parts.items()]
        self._append(offsets[0] - BLOCK)
        self._end = self._tar.end

    def finish(self) -> tuple[TarWriter, UnfinishedFile]:
        """Completes both files, which are still to be put in place."""
        if self._end:
            self._append(self._end)
        return self._tar, self._index

    def abandon(self) -> None:
        self._tar.file.abandon()
        self._index.abandon()

    def _append(self, offset: int) -> None:
        self._index.open().write(OFFSET.pack(offset))


def write_index(folder: Path, files: Sequence[FormFile], *, dataset: str) -> None:
    """Writes the `.nv-meta` of a folder of tars whose members are KEY.EXTENSION.

    Args:
        files: the form's files, the tars among them.
        dataset: the text of dataset.yaml.
    """
    tars = count_samples(files)
    samples = (sample for i, name in enumerate(tars) for sample in read_samples(folder / name, i))
    write_meta(folder, tars, samples, dataset=dataset)


def count_samples(files: Sequence[FormFile]) -> dict[str, int]:
    """The tars among these files, and their numbers of samples, by the sizes of their `.tar.idx`."""
    return {
        file.name.removesuffix(".idx"): file.num_bytes // OFFSET.size - 1
        for file in files
        if file.name.endswith(".tar.idx")
    }


def write_meta(folder: Path, tars: Mapping[str, int], samples: Iterable[IndexedSample], *, dataset: str) -> None:
    """Writes the files of `INDEXES` into a folder.

    Args:
        tars: path, absolute or relative to `folder` -> number of samples.
        samples: of all tars, in order.
        dataset: the text of dataset.yaml.
    """
    info = json.dumps({"shard_counts": tars}, indent=2)
    put_text(folder / META / ".info.json", info)
    names = "".join(f"  - {json.dumps(name)}\n" for name in tars)  # a JSON string is a YAML one
    put_text(folder / META / "split.yaml", f"split_parts:\n  train:\n{names}")
    put_text(folder / META / "dataset.yaml", dataset)
    digest = _write_database(folder / META / "index.sqlite", samples)
    put_text(folder / META / "index.uuid", str(uuid.UUID(bytes=digest[:16])))


def read_samples(tar: Path, number: int) -> Iterator[IndexedSample]:
    """The samples of a tar of this export, from its headers alone."""
    groups = groupby(list_members(tar), key=lambda member: member.name.partition(".")[0])
    for index, (key, members) in enumerate(groups):
        yield IndexedSample(tar=number, index=index, key=key, parts=tuple(members))


def _write_database(path: Path, samples: Iterable[IndexedSample]) -> bytes:
    """Writes index.sqlite; returns a digest of its rows. Equal samples give equal bytes."""
    digest = hashlib.sha256()
    with place_atomic(path) as unfinished, closing(sqlite3.connect(unfinished)) as database:
        for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", *TABLES):
            database.execute(statement)
        for sample in samples:
            digest.update(repr(sample).encode())
            _insert_sample(database, sample)
        for statement in KEYS:
            database.execute(statement)
        database.commit()
    return digest.digest()


def _insert_sample(database: sqlite3.Connection, sample: IndexedSample) -> None:
    start, end = sample.parts[0].offset - BLOCK, sample.parts[-1].end
    row = (sample.tar, sample.key, sample.index, start, end - start)
    database.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", row)
    database.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        [(sample.tar, sample.index, part.name.partition(".")[2], part.offset, part.num_bytes) for part in sample.parts],
    )
