"""Export form `overlay`: captions for a corpus that stays where it is, with the place of each image and no copy of it.

- `index/00000.parquet`: the columns of the training set, and `file`, `member`, `offset` and `num_stored` of each image;
- `webshart/NAME.json`, one per tar of the corpus: its members with captions, as `webshart` reads them;
- `captions/` and `images/` with `metadataset.yaml`: a polylithic dataset of Megatron-Energon. `captions/00000.tar` has
  a KEY.json for each sample; `images/` is an index of the corpus's tars in which each image is named KEY.EXTENSION.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.records import Image
from pipeline.storage.layout import PACKED
from pipeline.storage.payloads import BLOCK, TarMember, UnfinishedFile, commit_files, file_extension
from stages.exporters import CardEntry, ExportSample, FormFile, Origin, _energon, put_text
from stages.exporters._rows import ParquetRows, build_row_schema

CARD = CardEntry(image="member", caption="caption", data_files="overlay/index/*.parquet")
NEEDS_IMAGES = False
DIVIDES = False
INDEXES = (
    *(f"captions/{name}" for name in _energon.INDEXES),
    *(f"images/{name}" for name in _energon.INDEXES),
    "metadataset.yaml",
)
PLACES: Mapping[str, type] = {"file": str, "member": str, "offset": int, "num_stored": int}
METADATASET = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    path: ./captions
    aux:
      images: {images}
"""


def open(run: Path, shard: int, work: Path, split: str = "") -> Overlay:
    return Overlay(run, run / "export" / "overlay" / split, shard, work)


class Overlay:
    """The captions of one shard, and where its images are."""

    def __init__(self, run: Path, root: Path, shard: int, work: Path) -> None:
        self._run, self._root, self._work = run, root, work
        index = UnfinishedFile(self._root / "index" / f"{shard:05d}.parquet", work=work)
        self._rows = ParquetRows(index, partial(build_row_schema, added=PLACES))
        self._captions = _energon.IndexedTar(self._root / "captions" / f"{shard:05d}.tar", work=work)
        self._members: dict[tuple[str, str], dict[str, Any]] = {}  # tar and its name -> member -> webshart's entry

    def add(self, sample: ExportSample, suffix: str) -> None:
        assert sample.origin
        image, member = sample.origin.image, find_member(sample.origin)
        file = sample.origin.file if Path(image.file or "").is_absolute() else image.file
        place = {"file": file, "member": member, "offset": image.offset, "num_stored": image.num_bytes}
        self._rows.add({**sample.values, **place}, sample.columns)
        name = f"{image.key}.{file_extension(image.format)}" if image.offset else sample.origin.file.lstrip("/")
        values = json.dumps({"image": name, **sample.values}, ensure_ascii=False)
        self._captions.add(image.key, {"json": values.encode()})
        if image.offset:
            tar = sample.origin.file, sample.origin.name
            self._members.setdefault(tar, {})[member] = describe_member(sample, image)

    def commit(self) -> Mapping[str, int]:
        webshart = [self._write_webshart(*names, members) for names, members in self._members.items()]
        return commit_files(self._run, self._rows.finish(), *self._captions.finish(), *webshart)

    def abandon(self) -> None:
        self._rows.abandon()
        self._captions.abandon()

    def _write_webshart(self, file: str, name: str, members: Mapping[str, Any]) -> UnfinishedFile:
        name = name.removeprefix(f"{PACKED}/").removesuffix(".tar")
        if Path(name).is_absolute() or ".." in Path(name).parts:  # the plan has a name that leads out of the corpus
            name = Path(name).name
        size = Path(file).stat().st_size
        metadata = {"path": f"{name}.tar", "filesize": size, "files": members, "includes_image_geometry": True}
        out = UnfinishedFile(self._root / "webshart" / f"{name}.json", work=self._work)
        out.open().write(json.dumps(metadata, ensure_ascii=False).encode())
        return out


def find_member(origin: Origin) -> str:
    """The image's name in its tar; the corpus's name for it where it is a file of its own, or has a long name."""
    image = origin.image
    usual = f"{image.source_key}.{file_extension(image.format)}"
    if not image.offset:
        return image.source_key
    with Path(origin.file).open("rb") as tar:
        header = os.pread(tar.fileno(), BLOCK, image.offset - BLOCK)
    name, prefix = (field.partition(b"\0")[0].decode(errors="replace") for field in (header[:100], header[345:500]))
    name = f"{prefix}/{name}" if prefix else name
    is_whole = name.startswith((f"{image.source_key}.", f"{image.key}."))
    return name if is_whole else usual


def describe_member(sample: ExportSample, image: Image) -> dict[str, Any]:
    """A member as `webshart` describes it."""
    row = sample.row
    return {
        "offset": image.offset,
        "length": image.num_bytes,
        "sha256": image.sha256,
        "width": row.width,
        "height": row.height,
        "aspect": round(row.width / row.height, 6),
        "captions": row.caption,
        "json_metadata": sample.values,
    }


def write_index(folder: Path, files: Sequence[FormFile]) -> None:
    captions = [
        FormFile(name=file.name.removeprefix("captions/"), num_bytes=file.num_bytes)
        for file in files
        if file.name.startswith("captions/")
    ]
    _energon.write_index(folder / "captions", captions, dataset=_energon.CRUDE)
    tables = [folder / file.name for file in files if file.name.endswith(".parquet")]
    run = os.path.relpath(find_run(folder), folder / "images")
    tars = {tar: sum(1 for _ in rows) for tar, rows in group_images(tables, run)}
    if tars:
        _energon.write_meta(folder / "images", tars, list_images(tables, run), dataset=_energon.CRUDE)
    put_text(folder / "metadataset.yaml", METADATASET.format(images="./images" if tars else "filesystem:///"))


def find_run(folder: Path) -> Path:
    return next(parent for parent in folder.parents if (parent / "export").is_dir() and parent.name != "export")


def list_images(tables: Sequence[Path], run: str) -> Iterator[_energon.IndexedSample]:
    """The images that are in tars, each as a sample that is named by its key."""
    for number, (_, rows) in enumerate(group_images(tables, run)):
        for index, row in enumerate(rows):
            name = f"{row['key']}.{file_extension(row['format'])}"
            member = TarMember(name=name, offset=row["offset"], num_bytes=row["num_stored"])
            yield _energon.IndexedSample(tar=number, index=index, key=row["key"], parts=(member,))


def group_images(tables: Sequence[Path], run: str) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """The tars of the corpus and where their images are, in order; `run` is the path from `images/` to the run."""
    places = (row for row in read_places(tables) if row["offset"])
    for file, rows in groupby(places, key=lambda row: str(row["file"])):
        yield (file if Path(file).is_absolute() else f"{run}/{file}"), rows


def read_places(tables: Sequence[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for table in tables:
        with pq.ParquetFile(table) as parquet:
            for batch in parquet.iter_batches(columns=["key", "format", *PLACES]):
                yield from batch.to_pylist()
