"""Rows that copies share: a pass asks about one image of those with equal bytes, and each of them has a row.

`share_rows` divides a pass into one that asks, whose tables are in `asked/`, and one that gives every image its rows.
Curation says which images are copies; what the rows say is not known here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engines import Engine
from pipeline.execution.passes import COPIES, AllShards, Pass, Shard
from pipeline.records import (
    Caption,
    ChainedCaption,
    Curation,
    Record,
    Score,
    SharedCaption,
    SharedChainedCaption,
    SharedScore,
    column_names,
)
from pipeline.sections import Run
from pipeline.storage import tables

if TYPE_CHECKING:
    import pyarrow as pa

CURATION = "curation"
RECORDS: Mapping[type[Record], type[Record]] = {
    Caption: SharedCaption,
    ChainedCaption: SharedChainedCaption,
    Score: SharedScore,
}
SPENT = ("num_prompt_tokens", "num_output_tokens")  # by the row that was asked
NAME = "rows"  # of the files that hold the rows which other shards need


@dataclass(frozen=True, kw_only=True)
class SharedRow:
    """A row of the pass that asked, for one of the images that share it."""

    key: str  # of the image
    row: Any

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, *self.row.id[1:])


def shares_rows(run: Run) -> bool:
    """True if images with equal bytes share their rows."""
    return any(config.share for config in run.sections["curate"].values())


def asked_folder(folder: str) -> str:
    """The folder of the tables for which an engine is asked."""
    return f"asked/{folder}"


def is_copy(row: Curation) -> bool:
    """True for an image that has its rows from another one with the same bytes."""
    return not row.drop and row.copy_of not in (None, row.key)


def share_rows(p: Pass) -> Iterator[Pass]:
    """The pass that asks, without the images that are copies, and the one that gives them their rows."""
    asked, record = asked_folder(p.folder), RECORDS[p.record]
    yield replace(p, folder=asked)
    yield Pass(
        stage=p.stage,
        name=p.name,
        caption=p.caption,
        part=COPIES,
        folder=p.folder,
        reads=(CURATION, asked),
        reads_all=(CURATION, asked),
        prepare=partial(_collect_rows, asked=asked, record=p.record),
        version=p.version,
        slice={"shared": True, "num_candidates": p.slice.get("num_candidates", 1)},
        record=record,
        max_error_share=1.0,
        inputs=partial(_read_rows, asked=asked, record=p.record),
        work=partial(_copy_rows, record=record),
    )


def _collect_rows(shards: AllShards, folder: Path, *, asked: str, record: type[Record]) -> None:
    """Writes the rows that images of other shards share, sorted by key, and their keys."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted: set[str] = set()
    for number, batches in shards.read_tables(CURATION, Curation, ("key", "drop", "copy_of")):
        own = f"{number:06d}"
        for batch in batches:
            copies = batch.filter(pc.and_(pc.invert(batch.column("drop")), pc.is_valid(batch.column("copy_of"))))
            wanted.update(key for key in copies.column("copy_of").to_pylist() if not key.startswith(own))
    keys, names = list[str](), pa.array(sorted(wanted), pa.string())
    schema, file = None, None
    for _, batches in shards.read_tables(asked, record, column_names(record)):
        for batch in batches:
            found = batch.filter(pc.is_in(batch.column("key"), value_set=names))
            if file is None:
                file = pa.ipc.new_file(str(folder / f"{NAME}.arrow"), schema := found.schema)
            file.write_batch(found.cast(schema) if found.schema != schema else found)
            keys += found.column("key").to_pylist()
    if file is not None:
        file.close()
    np.save(folder / f"{NAME}.npy", np.array(keys, "U12"))


def _read_rows(shard: Shard, *, asked: str, record: type[Record]) -> Iterator[SharedRow]:
    find_own, find_others = shard.lookup(asked, record), _open_rows(shard, record)
    pending: dict[str, tuple[Any, ...]] = {}  # rows of this shard that a later copy shares
    wanted = {row.copy_of for row in shard.read_table(CURATION, Curation) if is_copy(row)}
    for row in shard.read_table(CURATION, Curation):
        if row.drop:
            continue
        if not is_copy(row):
            rows = find_own(row.key)
            if row.key in wanted:
                pending[row.key] = rows
        else:
            original = row.copy_of or ""
            rows = pending[original] if original in pending else find_others(original)
        yield from (SharedRow(key=row.key, row=one) for one in rows)


def _open_rows(shard: Shard, record: type[Record]) -> Any:
    """A function from a key to the rows that images of other shards share."""

    @cache
    def open_files() -> tuple[list[str], pa.Table]:
        import numpy as np
        import pyarrow as pa

        assert shard.ensure_shared is not None
        folder = shard.ensure_shared()
        keys = np.load(folder / f"{NAME}.npy", allow_pickle=False)
        return keys, pa.ipc.open_file(pa.memory_map(str(folder / f"{NAME}.arrow"))).read_all()

    def find_rows(key: str) -> tuple[Any, ...]:
        keys, table = open_files()
        start, stop = bisect_left(keys, key), bisect_left(keys, f"{key}~")
        if start == stop:
            return ()
        (batch,) = table.slice(start, stop - start).combine_chunks().to_batches()
        rows: Iterable[Any] = tables.from_arrow(record, batch)
        return tuple(rows)

    return find_rows


def _copy_rows(inputs: Iterator[SharedRow], _: Mapping[str, Engine], *, record: type[Any]) -> Iterator[Record]:
    for item in inputs:
        values = {field.name: getattr(item.row, field.name) for field in fields(item.row)}
        if item.key == item.row.key:
            yield record(**values)
        else:
            spent = dict.fromkeys(name for name in SPENT if name in values)
            yield record(**{**values, **spent, "key": item.key, "shared_from": item.row.key})
