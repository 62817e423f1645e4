"""Export form `parquet`: `export/parquet/00000.parquet` with images as Hugging Face `datasets` stores them.

`load_dataset("parquet", ...)` yields decoded images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.records import Exported, arrow_schema
from pipeline.storage.payloads import UnfinishedFile, commit_files
from stages.exporters import CardEntry, ExportSample
from stages.exporters._rows import abandon_parquet

if TYPE_CHECKING:
    import pyarrow as pa

CARD = CardEntry(image="image", caption="caption", data_files="parquet/*.parquet")
IMAGE_BYTES = "image.bytes"  # of the leaves; compressed already, and no two are equal
ROWS_PER_GROUP = 100  # the Hub's viewer fails on row groups of more than about 100 MB
ROWS_PER_BATCH = 4  # after which a page may end; with Arrow's 1024, all images of a group are one page


def open(run: Path, shard: int, work: Path, split: str = "") -> ImageParquet:
    return ImageParquet(run, UnfinishedFile(run / "export" / "parquet" / split / f"{shard:05d}.parquet", work=work))


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=["key", "image"]):
            for row in batch.to_pylist():
                yield row["key"], row["image"]["bytes"]


class ImageParquet:
    """A Parquet file with an HF `Image` column and the columns of `Exported`."""

    def __init__(self, run: Path, file: UnfinishedFile) -> None:
        self._run, self._file = run, file
        self._rows: list[dict[str, Any]] = []
        self._columns: tuple[str, ...] = ()
        self._writer: Any = None

    def add(self, sample: ExportSample, suffix: str) -> None:
        self._columns = sample.columns
        self._rows.append({"image": {"bytes": sample.data, "path": f"{sample.row.key}.{suffix}"}, **sample.values})
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def commit(self) -> Mapping[str, int]:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        return commit_files(self._run, self._file)

    def abandon(self) -> None:
        abandon_parquet(self._writer, self._file)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = build_hub_schema(self._columns)
        if self._writer is None:
            others = [leaf for leaf in _list_leaves(schema) if leaf != IMAGE_BYTES]
            self._writer = pq.ParquetWriter(
                self._file.open(),
                schema,
                compression={**dict.fromkeys(others, "zstd"), IMAGE_BYTES: "none"},
                use_dictionary=others,
                write_page_index=True,
                write_batch_size=ROWS_PER_BATCH,
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema), row_group_size=ROWS_PER_GROUP)
        self._rows = []


def _list_leaves(schema: pa.Schema) -> list[str]:
    """The columns as Parquet stores them, with a dot before each inner name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.ParquetFile(sink.getvalue()).schema
    return [stored.column(index).path for index in range(len(stored))]


def build_hub_schema(columns: Sequence[str]) -> pa.Schema:
    """An HF `Image` column, then these columns of `Exported`, with the feature types that the Hub reads."""
    import pyarrow as pa

    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    fields = [field for field in arrow_schema(Exported) if field.name in columns]
    features = {"image": {"_type": "Image"}} | {field.name: _describe_feature(field.type) for field in fields}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field("image", image), *fields], metadata=metadata)


def _describe_feature(type: pa.DataType) -> Any:
    import pyarrow as pa

    if pa.types.is_list(type):
        return [_describe_feature(type.value_type)]  # `datasets` before 4 has no type "List", later ones take both
    if pa.types.is_struct(type):
        return {field.name: _describe_feature(field.type) for field in type}
    return {"dtype": {"double": "float64"}.get(str(type), str(type)), "_type": "Value"}
