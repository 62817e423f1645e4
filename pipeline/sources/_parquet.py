"""Parquet files of a corpus, read a little at a time, with a broken file distinguished from a broken disk.

It refuses to know what the columns mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.errors import BrokenParquetError
from pipeline.sources import _columns

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BUFFER_BYTES = 1 << 20  # of a column that is read at a time
MAX_ROWS = 16  # in memory at a time, since a footer may be false
MAX_BYTES = 1 << 26  # of rows in memory at a time, when there are more than one


def open_table(stream: BinaryIO) -> pq.ParquetFile:
    """Reads the footer.

    Raises:
        BrokenParquetError: there is none.
    """
    import pyarrow.parquet as pq

    with _decoder_errors():
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True)


def list_groups(table: pq.ParquetFile) -> Iterator[tuple[int, range]]:
    """The row groups, with the numbers of their rows."""
    row = 0
    for group in range(table.metadata.num_row_groups):
        num = table.metadata.row_group(group).num_rows
        yield group, range(row, row + num)
        row += num


def read_batches(table: pq.ParquetFile, columns: list[str], *, group: int) -> Iterator[pa.RecordBatch]:
    """The rows of a group, in batches small enough that each row may unpack to the size of the whole group.

    Parquet keeps a repeated value once, so a few kilobytes may unpack to gigabytes.

    Raises:
        BrokenParquetError: the next batch cannot be read.
    """
    with _decoder_errors():
        num_rows = min(MAX_ROWS, MAX_BYTES // max(1, table.metadata.row_group(group).total_byte_size))
        batches = table.iter_batches(max(1, num_rows), row_groups=[group], columns=columns)
    while True:
        with _decoder_errors():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def read_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """All rows as Python objects.

    Raises:
        BrokenParquetError: the next rows cannot be read.
    """
    table = open_table(stream)
    for group, _ in list_groups(table):
        for batch in read_batches(table, table.schema_arrow.names, group=group):
            yield from _columns.convert_rows(batch)


@contextmanager
def _decoder_errors() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # from the disk: decoders set no number
        raise BrokenParquetError(f"the Parquet cannot be read: {error}") from error
