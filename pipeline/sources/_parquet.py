"""Decides how a Parquet file is opened and read: little of it at a time, telling a broken file from a broken disk.

It refuses to know what the columns are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import BrokenParquetError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BUFFER_BYTES = 1 << 20  # of a column that is read at a time
MAX_ROWS = 16  # in memory at a time: a footer may lie
MAX_BYTES = 1 << 26  # of rows in memory at a time, when there are more than one


def table(stream: BinaryIO) -> pq.ParquetFile:
    """The file, of which only the footer is read.

    Raises:
        BrokenParquetError: it has none.
    """
    import pyarrow.parquet as pq

    with _decoding():
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True)


def groups(table: pq.ParquetFile) -> Iterator[tuple[int, range]]:
    """The row groups, with the numbers of their rows."""
    row = 0
    for group in range(table.metadata.num_row_groups):
        num = table.metadata.row_group(group).num_rows
        yield group, range(row, row + num)
        row += num


def batches(table: pq.ParquetFile, columns: list[str], *, group: int) -> Iterator[pa.RecordBatch]:
    """A row group, so few rows at a time that they are small whatever they are: each may be all that it has.

    Values are kept once however many rows have them, so a few kilobytes may unpack to gigabytes.

    Raises:
        BrokenParquetError: what comes next cannot be read.
    """
    with _decoding():
        num_rows = min(MAX_ROWS, MAX_BYTES // max(1, table.metadata.row_group(group).total_byte_size))
        found = table.iter_batches(max(1, num_rows), row_groups=[group], columns=columns)
    while True:
        with _decoding():
            batch = next(found, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _decoding() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's word; decoders give no number
        raise BrokenParquetError(f"the Parquet cannot be read: {error}") from error
