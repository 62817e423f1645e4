"""Export form `mds`: `export/mds/00000/shard.00000.mds`, by MosaicML's own writer, and one index of all folders.

`StreamingDataset(local="export/mds")` yields the columns of the training set, and the image file in `image`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.records import Exported, arrow_schema
from pipeline.storage.disk import start_writing
from stages.exporters import CardEntry, ExportSample, FormFile, put_text
from stages.exporters._folders import UnfinishedFolder

INDEX = "index.json"
CARD = CardEntry(image="image", caption="caption", files="mds/*/*.mds")
INDEXES = (INDEX,)
NUMBER_BYTES = 4  # of sizes and offsets, little-endian
ENCODINGS = {"string": "str", "int64": "int", "double": "float64", "bool": "uint8"}  # Arrow's type -> MDS; else JSON
ADVICE = (
    "export.formats: mds needs mosaicml-streaming, which is not installed: pip install '.[mds]' in a clone of recap;"
    " beside transformers 5, which it excludes: pip install --no-deps mosaicml-streaming brotli catalogue cramjam "
    "python-snappy zstd"
)


def require() -> None:
    """
    Raises:
        UserError: MosaicML's library is not installed.
    """
    from importlib.util import find_spec

    if find_spec("streaming") is None:
        raise UserError(ADVICE)


def open(run: Path, shard: int, work: Path, split: str = "") -> StreamingShard:
    require()
    return StreamingShard(run, UnfinishedFolder(run / "export" / "mds" / split / f"{shard:05d}", work=work))


def write_index(folder: Path, files: Sequence[FormFile]) -> None:
    """Joins the indexes of all shards' folders."""
    shards = []
    for file in files:
        name, _, base = file.name.partition("/")
        if base == INDEX:
            for shard in json.loads((folder / file.name).read_text(encoding="utf-8"))["shards"]:
                shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
                shards.append(shard)
    put_text(folder / INDEX, json.dumps({"shards": shards, "version": 2}, sort_keys=True))


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Reads the format without MosaicML's library, whose import takes half a minute.

    A file has the number of samples, the offset of each sample and of the end, the columns, and the samples.
    """
    if path.name == INDEX:
        return
    index = json.loads((path.parent / INDEX).read_text(encoding="utf-8"))
    (shard,) = (one for one in index["shards"] if one["raw_data"]["basename"] == path.name)
    with path.open("rb") as file:
        (num,) = _read_numbers(file, 1)
        for start, end in pairwise(_read_numbers(file, num + 1)):
            file.seek(start)
            row = _split_sample(file.read(end - start), shard["column_names"], shard["column_sizes"])
            yield row["key"].decode(), row["image"]


def _read_numbers(file: IO[bytes], num: int) -> list[int]:
    data = file.read(NUMBER_BYTES * num)
    if len(data) != NUMBER_BYTES * num:
        raise ValueError("it ends within its table of samples")
    return [int.from_bytes(data[at : at + NUMBER_BYTES], "little") for at in range(0, len(data), NUMBER_BYTES)]


def _split_sample(data: bytes, names: Sequence[str], sizes: Sequence[int | None]) -> dict[str, bytes]:
    """Column -> value as stored. A sample has the sizes of the columns that have no fixed one, then all values."""
    values = io.BytesIO(data)
    own = iter(_read_numbers(values, sizes.count(None)))
    every = [next(own) if size is None else size for size in sizes]
    if values.tell() + sum(every) != len(data):
        raise ValueError("a sample is not as long as its columns")
    return {name: values.read(size) for name, size in zip(names, every, strict=True)}


@cache
def _define_writer() -> Any:
    """MosaicML's writer, but samples are copied once, not twice, and the disk begins to write a full file at once."""
    from streaming import MDSWriter

    class EarlyWriter(MDSWriter):  # type: ignore[misc, unused-ignore]
        def encode_joint_shard(self) -> bytes:
            samples = self.new_samples
            start = NUMBER_BYTES * (len(samples) + 2) + len(self.config_data)
            numbers = [len(samples), *accumulate(map(len, samples), initial=start)]
            head = b"".join(number.to_bytes(NUMBER_BYTES, "little") for number in numbers)
            return b"".join((head, self.config_data, *samples))

        def flush_shard(self) -> None:
            super().flush_shard()
            name = self.shards[-1]["raw_data"]["basename"]
            with Path(self.local, name).open("rb") as file:
                start_writing(file.fileno())

    return EarlyWriter


class StreamingShard:
    """The files of one shard; MosaicML's writer splits them at 64 MiB, and holds one of them in memory."""

    def __init__(self, run: Path, folder: UnfinishedFolder) -> None:
        self._run, self._folder = run, folder
        self._writer: Any = None
        self._encodings: dict[str, str] = {}

    def add(self, sample: ExportSample, suffix: str) -> None:
        if self._writer is None:
            types = {field.name: str(field.type) for field in arrow_schema(Exported)}
            self._encodings = {name: ENCODINGS.get(types[name], "json") for name in sample.columns}
            writer = _define_writer()
            self._writer = writer(out=str(self._folder.open()), columns={**self._encodings, "image": "bytes"})
        self._writer.write({**sample.values, "image": sample.data})

    def commit(self) -> Mapping[str, int]:
        if self._writer is not None:
            self._writer.finish()
        self._folder.commit()
        files = sorted(self._folder.path.iterdir()) if self._writer is not None else []
        return {str(path.relative_to(self._run)): path.stat().st_size for path in files}

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.cancel_future_jobs()
        self._folder.abandon()
