"""Rows of a Parquet file of the export, written in groups, so that memory does not grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.records import Exported, arrow_schema
from pipeline.storage.payloads import UnfinishedFile

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_PER_GROUP = 1000


class ParquetRows:
    """Rows that are appended to an unfinished file; the file is created with the first."""

    def __init__(self, file: UnfinishedFile, build_schema: Callable[[tuple[str, ...]], pa.Schema]) -> None:
        self.file = file
        self._build_schema = build_schema
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, row: dict[str, Any], columns: tuple[str, ...]) -> None:
        """Appends a row; `columns` are those of `Exported` that the training set has."""
        import pyarrow.parquet as pq

        if self._writer is None:
            schema = self._build_schema(columns)
            self._writer = pq.ParquetWriter(self.file.open(), schema, compression="zstd", write_page_index=True)
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def finish(self) -> UnfinishedFile:
        """Writes what is left, and returns the file, which is still to be put in place."""
        if self._writer is not None:
            self._flush()
            self._writer.close()
        return self.file

    def abandon(self) -> None:
        abandon_parquet(self._writer, self.file)

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows = []


def abandon_parquet(writer: pq.ParquetWriter | None, file: UnfinishedFile) -> None:
    """Removes an unfinished file. Its writer is closed first: when it went, it would write to the closed file."""
    if writer is not None:
        with suppress(OSError, ValueError):
            writer.close()
    file.abandon()


def build_row_schema(columns: Sequence[str], *, added: Mapping[str, type]) -> pa.Schema:
    """The given columns of `Exported`, and further ones with their types."""
    import pyarrow as pa

    fields = [field for field in arrow_schema(Exported) if field.name in columns]
    fields += [pa.field(name, pa.int64() if type is int else pa.string(), False) for name, type in added.items()]
    return pa.schema(fields)
