"""Compacted copies of tables: hundreds of small files as one large file, for queries over the whole run.

The tables stay as they are: their footers decide what is done, and plain globs read them. A copy is outside those globs
(in `compact/`), and lists its members with their times and sizes; a copy of which a member has changed is ignored. So
a copy changes no answer, and may be removed at any time. Beside each is a file with its SHA-256: the checksums of its
pages do not protect headers, statistics and footer, which queries trust too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import BrokenTableError
from pipeline.storage.layout import table_path
from pipeline.storage.listing import FILE_COLUMNS, list_files
from pipeline.storage.payloads import hash_file, measure_file
from pipeline.storage.tables import open_atomic

if TYPE_CHECKING:
    import pyarrow as pa

COMPACT = "compact"  # folder of the copies, in which they have the folders of their tables
SHARDS_PER_FILE = 500
ROWS_PER_GROUP = 1 << 16  # in memory at a time
MEMBERS_KEY = b"recap.members"  # in the Parquet footer: [[shard, time, size], ...]

Members = Mapping[int, tuple[int, int]]  # shard -> time of its file in nanoseconds, and bytes


def compact_folder(run: Path, folder: str) -> tuple[int, int]:
    """Writes the copies of a folder's tables that are missing or outdated; returns how many, and of how many tables.

    Raises:
        BrokenTableError: a table cannot be read.
    """
    num_copies = num_tables = 0
    tables = _list_members(run / folder)
    kept = set[str]()
    for _, shards in groupby(sorted(tables), key=lambda shard: shard // SHARDS_PER_FILE):
        members = {shard: tables[shard] for shard in shards}
        copy = run / COMPACT / folder / f"{min(members):05d}-{max(members):05d}.parquet"
        kept.add(copy.name)
        if len(members) > 1 and read_members(copy) != members:
            _write_copy(copy, [table_path(run, folder, shard) for shard in members], members)
            num_copies, num_tables = num_copies + 1, num_tables + len(members)
    for copy in (run / COMPACT / folder).glob("*.parquet"):
        if copy.name not in kept:
            _sum_path(copy).unlink(missing_ok=True)
            copy.unlink()
    return num_copies, num_tables


def _list_members(folder: Path) -> dict[int, tuple[int, int]]:
    values = list_files(f"{folder}/*.parquet")
    rows = (values[at : at + len(FILE_COLUMNS)] for at in range(0, len(values), len(FILE_COLUMNS)))
    return {shard: (time, size) for shard, time, size, _ in rows}


def read_members(copy: Path) -> Members:
    """The tables that a copy was made from; none when there is no whole copy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = json.loads((pq.read_metadata(copy).metadata or {})[MEMBERS_KEY])
        return {shard: (time, size) for shard, time, size in rows}
    except (FileNotFoundError, pa.ArrowException, OSError, KeyError, ValueError):
        return {}


def _write_copy(copy: Path, paths: Sequence[Path], members: Members) -> None:
    """Copies the rows in order, with the columns that the tables have: older ones may lack some, as in their views."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.unify_schemas([pq.read_schema(path).remove_metadata() for path in paths])
    _sum_path(copy).unlink(missing_ok=True)  # never that of another copy: one without is read page by page
    listed = json.dumps([[shard, *about] for shard, about in members.items()])
    with (
        open_atomic(copy) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        pending: list[pa.RecordBatch] = []
        for path in paths:
            for batch in _read_raw(path):
                pending.append(_add_columns(batch, schema))
                if sum(map(len, pending)) >= ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_batches(pending, schema), row_group_size=ROWS_PER_GROUP)
                    pending = []
        if pending:
            writer.write_table(pa.Table.from_batches(pending, schema), row_group_size=ROWS_PER_GROUP)
        writer.add_key_value_metadata({MEMBERS_KEY.decode(): listed})
    with open_atomic(_sum_path(copy)) as file:
        file.write(_format_sum(copy))


def _sum_path(copy: Path) -> Path:
    """The file with the digest of a copy, as `sha256sum -c` reads it there."""
    return copy.with_suffix(".sha256")


def _format_sum(copy: Path) -> bytes:
    return f"{hash_file(copy)}  {copy.name}\n".encode()


def _read_raw(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(ROWS_PER_GROUP)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise BrokenTableError(path, f"cannot be read ({error})") from error


def _add_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    names = set(batch.schema.names)
    columns = [
        batch.column(field.name) if field.name in names else pa.nulls(len(batch), field.type) for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def list_current_files(run: Path, pattern: str) -> list[str]:
    """The files of a glob below the run, with copies instead of their members; none where no copy is current."""
    parent, top = pattern.rpartition("/")[0], pattern.partition("/")[0]
    if not (run / COMPACT / top).is_dir():
        return []
    names, num_copies = list[str](), 0
    for folder in sorted(path for path in run.glob(parent) if path.is_dir()):
        name = str(folder.relative_to(run))
        tables = _list_members(folder)
        starts: dict[int, str] = {shard: f"{name}/{shard:05d}.parquet" for shard in tables}
        for copy in (run / COMPACT / name).glob("*.parquet"):
            members = read_members(copy)
            if members and all(tables.get(shard) == about for shard, about in members.items()):
                num_copies += 1
                for shard in members:
                    del starts[shard]
                starts[min(members)] = f"{COMPACT}/{name}/{copy.name}"
        others = (one for one in os.listdir(folder) if one.endswith(".parquet") and not one[:-8].isdigit())  # noqa: PTH208
        names += [*(starts[shard] for shard in sorted(starts)), *(f"{name}/{one}" for one in sorted(others))]
    return names if num_copies else []


def check_copies(run: Path) -> Iterator[tuple[Path, str]]:
    """The copies that are damaged, and why. Outdated ones are not read."""
    for copy in sorted((run / COMPACT).rglob("*.parquet")):
        if problem := measure_file(copy)[1]:
            yield copy, problem
            continue
        sums = _sum_path(copy)
        has_sum = sums.is_file()  # copies of earlier versions have none
        if has_sum and sums.read_bytes() == _format_sum(copy):
            continue
        try:
            for _ in _read_raw(copy):
                pass
        except BrokenTableError as error:
            yield copy, error.message
        else:
            if has_sum:  # which of the two has changed, nothing tells
                yield copy, f"does not have the SHA-256 in {sums.name}"
