"""Parquet files of a corpus, read a little at a time, with a broken file distinguished from a broken disk.

It refuses to know what the columns mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline import machine
from pipeline.errors import BrokenParquetError
from pipeline.sources import _columns, _common

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

    def read_footer() -> pq.ParquetFile:
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True)

    with _decoder_errors(read_footer):
        return read_footer()


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
    num_rows = max(1, min(MAX_ROWS, MAX_BYTES // max(1, table.metadata.row_group(group).total_byte_size)))

    def start() -> Iterator[pa.RecordBatch]:
        return iter(table.iter_batches(num_rows, row_groups=[group], columns=columns))

    with _decoder_errors(start):
        batches = start()
    while True:
        with _decoder_errors(lambda: deque(start(), maxlen=0)):
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
def _decoder_errors(again: Callable[[], object]) -> Iterator[None]:
    """Translates errors of what `again` would do once more."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        machine.rule_out(error, again, needed=_common.MAX_IMAGE_BYTES)
        raise BrokenParquetError(f"the Parquet cannot be read: {error}") from error
