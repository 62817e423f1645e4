"""Export form `webdataset`: `export/webdataset/00000.tar` with KEY.jpg, KEY.json and KEY.txt for each sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from pipeline.storage.payloads import TarWriter, UnfinishedFile, commit_files
from stages.exporters import CardEntry, ExportSample

CARD = CardEntry(image="jpg", caption="txt")


def open(run: Path, shard: int, work: Path) -> WebDataset:
    return WebDataset(run, UnfinishedFile(run / "export" / "webdataset" / f"{shard:05d}.tar", work=work))


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
        row = sample.row
        self._tar.add(f"{row.key}.{suffix}", sample.data)
        self._tar.add(f"{row.key}.json", json.dumps(asdict(row), ensure_ascii=False).encode())
        self._tar.add(f"{row.key}.txt", row.caption.encode())

    def commit(self) -> Mapping[str, int]:
        return commit_files(self._run, self._tar)

    def abandon(self) -> None:
        self._tar.file.abandon()
