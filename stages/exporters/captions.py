"""Export form `captions`: `export/captions/00000.parquet` without images, to join to a corpus by sha256, key or URL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.storage.payloads import UnfinishedFile, commit_files
from stages.exporters import CardEntry, ExportSample
from stages.exporters._rows import ParquetRows, build_row_schema

CARD = CardEntry(image="url", caption="caption", data_files="captions/*.parquet")
NEEDS_IMAGES = False


def open(run: Path, shard: int, work: Path, split: str = "") -> Captions:
    return Captions(run, UnfinishedFile(run / "export" / "captions" / split / f"{shard:05d}.parquet", work=work))


class Captions:
    """A Parquet file with the columns of `Exported`, and `url`."""

    def __init__(self, run: Path, file: UnfinishedFile) -> None:
        self._run, self._rows = run, ParquetRows(file, partial(build_row_schema, added={"url": str}))

    def add(self, sample: ExportSample, suffix: str) -> None:
        self._rows.add({**sample.values, "url": find_url(sample)}, sample.columns)

    def commit(self) -> Mapping[str, int]:
        return commit_files(self._run, self._rows.finish())

    def abandon(self) -> None:
        self._rows.abandon()


def find_url(sample: ExportSample) -> str:
    """The address that the corpus gives for the image; "" if it does not."""
    if "://" in sample.row.source_key:
        return sample.row.source_key
    metadata = json.loads(sample.row.metadata)
    urls = (value for name, value in metadata.items() if name.lower() in ("url", "image_url") and value)
    return str(next(urls, ""))
