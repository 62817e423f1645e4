"""Export form `webdataset`: `export/webdataset/00000.tar` with KEY.jpg, KEY.json and KEY.txt for each sample.

A shard without samples has no tar, so the numbers may have gaps; index.json lists the tars as `wids` reads them.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.storage.payloads import TarWriter, UnfinishedFile, commit_files
from stages.exporters import CardEntry, ExportSample, FormFile

CARD = CardEntry(image="jpg", caption="txt")
INDEXES = ("index.json",)


def open(run: Path, shard: int, work: Path) -> WebDataset:
    return WebDataset(run, UnfinishedFile(run / "export" / "webdataset" / f"{shard:05d}.tar", work=work))


def build_index(files: Sequence[FormFile]) -> Mapping[str, str]:
    shards = [{"url": file.name, "nsamples": file.num_samples, "filesize": file.num_bytes} for file in files]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    return {"index.json": json.dumps(index, indent=2) + "\n"}


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            name, _, suffix = member.name.partition(".")
            if suffix not in ("json", "txt"):
                file = tar.extractfile(member)
                assert file is not None, f"{path}: {member.name} is not a file"
                yield name, file.read()


class WebDataset:
    """A tar in which the members of a sample are adjacent."""

    def __init__(self, run: Path, file: UnfinishedFile) -> None:
        self._run, self._tar = run, TarWriter(file)

    def add(self, sample: ExportSample, suffix: str) -> None:
        key = sample.row.key
        self._tar.add(f"{key}.{suffix}", sample.data)
        self._tar.add(f"{key}.json", json.dumps(sample.values, ensure_ascii=False).encode())
        self._tar.add(f"{key}.txt", sample.line.encode())

    def commit(self) -> Mapping[str, int]:
        return commit_files(self._run, self._tar)

    def abandon(self) -> None:
        self._tar.file.abandon()
