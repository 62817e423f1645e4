"""Export form `webdataset`: `export/webdataset/00000.tar` with KEY.jpg, KEY.json and KEY.txt for each sample.

A shard without samples has no tar, so the numbers may have gaps; index.json lists the tars as `wids` reads them.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.storage.payloads import commit_files
from stages.exporters import CardEntry, ExportSample, FormFile, _energon, put_text

CARD = CardEntry(image="jpg", caption="txt", data_files="webdataset/*.tar")
INDEXES = ("index.json", *_energon.INDEXES)
DATASET = _energon.CAPTIONS.format(image=", ".join(("jpg", "png", "webp", "gif", "avif", "tif", "bmp")))


def open(run: Path, shard: int, work: Path, split: str = "") -> WebDataset:
    return WebDataset(run, _energon.IndexedTar(run / "export" / "webdataset" / split / f"{shard:05d}.tar", work=work))


def write_index(folder: Path, files: Sequence[FormFile]) -> None:
    sizes, counts = {file.name: file.num_bytes for file in files}, _energon.count_samples(files)
    shards = [{"url": name, "nsamples": num, "filesize": sizes[name]} for name, num in counts.items()]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    put_text(folder / "index.json", json.dumps(index, indent=2) + "\n")
    _energon.write_index(folder, files, dataset=DATASET)


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix != ".tar":
        return
    with tarfile.open(path) as tar:
        for member in tar:
            name, _, suffix = member.name.partition(".")
            if suffix not in ("json", "txt"):
                file = tar.extractfile(member)
                assert file is not None, f"{path}: {member.name} is not a file"
                yield name, file.read()


class WebDataset:
    """A tar in which the members of a sample are adjacent."""

    def __init__(self, run: Path, tar: _energon.IndexedTar) -> None:
        self._run, self._tar = run, tar

    def add(self, sample: ExportSample, suffix: str) -> None:
        values = json.dumps(sample.values, ensure_ascii=False)
        parts = {suffix: sample.data, "json": values.encode(), "txt": sample.line.encode()}
        self._tar.add(sample.row.key, parts)

    def commit(self) -> Mapping[str, int]:
        return commit_files(self._run, *self._tar.finish())

    def abandon(self) -> None:
        self._tar.abandon()
