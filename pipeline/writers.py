"""Decides which files stand beside a table: the tars of packed images, and the finished training set.

A payload takes what a stage yields, writes its bytes, and gives the row. Its files appear under their names just
before the table does, whose stamp has their names and sizes: what is lost or cut short later is noticed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.records import Exported, Image, Record, schema
from pipeline.shard import PACKED, work_folder
from pipeline.tables import Stamp, sync_folder, whole_stamp

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 100  # of exported Parquet: the Hub's viewer fails on groups of more than about 100 MB
BLOCK = 512  # bytes of a tar header


class Payload(Protocol):
    """Files beside a table, of one shard."""

    def take(self, output: Any) -> Record:
        """Writes what the output carries and returns its row."""

    def commit(self) -> Mapping[str, int]:
        """Puts the files in place; returns their names within the run and their bytes, for the table's stamp."""

    def abandon(self) -> None:
        """Removes what was written."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An image row, and its bytes when they are to be packed: as they are, never encoded again."""

    row: Image
    data: bytes | None

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sample of the training set with its image file."""

    row: Exported
    data: bytes

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id


class Unfinished:
    """A file being written outside its final folder; nothing is there until the first byte."""

    def __init__(self, path: Path, *, work: Path) -> None:
        self.path = path
        self._beside = work / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
        self._file: io.BufferedWriter | None = None

    def open(self) -> io.BufferedWriter:
        if self._file is None:
            for folder in (self.path.parent, self._beside.parent):
                folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._beside, "xb")
        return self._file

    def commit(self) -> int:
        """Puts the file in place and returns its bytes; without a byte written, the final name is free afterwards."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        num_bytes = os.fstat(self._file.fileno()).st_size
        self._file.close()
        os.replace(self._beside, self.path)
        sync_folder(self.path.parent)
        return num_bytes

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._beside.unlink(missing_ok=True)


class Tar:
    """A tar with equal bytes for equal members: no times, no owners."""

    def __init__(self, file: Unfinished) -> None:
        self.file = file
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        if self._tar is None:
            self._tar = tarfile.open(fileobj=self.file.open(), mode="w", format=tarfile.USTAR_FORMAT)
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        offset = self._tar.offset + BLOCK
        self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # else a header of every member stays in memory
        return offset

    def commit(self) -> int:
        if self._tar is not None:
            self._tar.close()
        return self.file.commit()


class Pack:
    """`shards/00000.tar`: the images of a corpus that was not in tars already."""

    def __init__(self, run: Path, shard: int) -> None:
        self._run = run
        self._tar = Tar(Unfinished(run / PACKED / f"{shard:05d}.tar", work=work_folder(run, "image", shard)))

    def take(self, output: Packed) -> Image:
        if output.data is None:
            return output.row
        offset = self._tar.add(f"{output.row.key}.{extension(output.row.format)}", output.data)
        return replace(output.row, file=str(self._tar.file.path.relative_to(self._run)), offset=offset)

    def commit(self) -> Mapping[str, int]:
        return _placed(self._run, self._tar)

    def abandon(self) -> None:
        self._tar.file.abandon()


class TrainingSet:
    """`export/webdataset/00000.tar` and `export/parquet/00000.parquet`, as trainers load them."""

    def __init__(self, run: Path, shard: int, *, formats: Sequence[str], image_extension: str) -> None:
        export, work = run / "export", work_folder(run, "export/index", shard)
        self._run, self._extension = run, image_extension
        self._tar = Tar(Unfinished(export / "webdataset" / f"{shard:05d}.tar", work=work))
        self._parquet = ImageParquet(Unfinished(export / "parquet" / f"{shard:05d}.parquet", work=work))
        chosen: dict[str, Callable[[str, Example], None]] = {"webdataset": self._to_tar, "parquet": self._to_parquet}
        self._sinks = [chosen[name] for name in formats]

    def take(self, output: Example) -> Exported:
        original = extension(output.row.format)
        for sink in self._sinks:
            sink(original if self._extension == "original" else self._extension, output)
        return output.row

    def commit(self) -> Mapping[str, int]:
        return _placed(self._run, self._tar, self._parquet)

    def abandon(self) -> None:
        self._tar.file.abandon()
        self._parquet.file.abandon()

    def _to_tar(self, suffix: str, example: Example) -> None:
        row = example.row
        self._tar.add(f"{row.key}.{suffix}", example.data)
        self._tar.add(f"{row.key}.json", json.dumps(asdict(row), ensure_ascii=False).encode())
        self._tar.add(f"{row.key}.txt", row.caption.encode())

    def _to_parquet(self, suffix: str, example: Example) -> None:
        self._parquet.add(
            {"image": {"bytes": example.data, "path": f"{example.row.key}.{suffix}"}, **asdict(example.row)}
        )


class ImageParquet:
    """Parquet with images as Hugging Face lays them out, so that `load_dataset` gives decoded pictures."""

    def __init__(self, file: Unfinished) -> None:
        self.file = file
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def commit(self) -> int:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        return self.file.commit()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self.file.open(), hub_schema(), compression="zstd", write_page_index=True)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=hub_schema()), row_group_size=ROWS_PER_GROUP)
        self._rows = []


def _placed(run: Path, *made: Tar | ImageParquet) -> Mapping[str, int]:
    sizes = {str(one.file.path.relative_to(run)): one.commit() for one in made}
    return {name: num_bytes for name, num_bytes in sizes.items() if num_bytes}


def what_is_lost(run: Path, stamp: Stamp) -> str:
    """Of the files that belong beside a table, the first that has gone or has another size, in words; "" for none."""
    for name, num_bytes in stamp.payload.items():
        try:
            size = (run / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != num_bytes:
            return f"{name} has {size} bytes and was written with {num_bytes}"
    return ""


def sound_stamp(run: Path, table: Path) -> Stamp | None:
    """The stamp of a table file that is whole and has all that belongs beside it; None otherwise."""
    stamp = whole_stamp(table)
    return stamp if stamp is not None and not what_is_lost(run, stamp) else None


def hub_schema() -> pa.Schema:
    """Of exported Parquet: an HF `Image` column, then the columns of `Exported`."""
    import pyarrow as pa

    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    fields = [pa.field("image", image), *schema(Exported)]
    features = {"image": {"_type": "Image"}}
    for field in schema(Exported):
        features[field.name] = _feature(field.type)
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def extension(format: str | None) -> str:
    """The usual file name ending of a Pillow format."""
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(format or "", format or "bin")


def _feature(type: pa.DataType) -> Any:
    import pyarrow as pa

    if pa.types.is_list(type):
        return {"feature": _feature(type.value_type), "_type": "List"}
    if pa.types.is_struct(type):
        return {field.name: _feature(field.type) for field in type}
    return {"dtype": {"double": "float64"}.get(str(type), str(type)), "_type": "Value"}
