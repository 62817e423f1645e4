"""Decides where lessons and rubrics lie while a model learns: in files of the run, of which memory has what is drawn.

A million rubrics are gigabytes, and every one is wanted at a time that chance decides. So they are written out once as
Arrow has them in memory, and mapped: the kernel reads a row when it is looked at, and may forget it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import tables
from pipeline.records import Demand, Record, Rubric, schema

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

KEPT_RUBRICS = 32  # unpacked, for the answers of one group are held against one rubric


def lessons(path: Path, rows: Iterable[Record], record: type[Record]) -> datasets.Dataset:
    """The rows in their order, as trainers take them."""
    import datasets

    batches = (tables.to_arrow(record, some) for some in tables.batched(rows, tables.ROWS_PER_GROUP))
    _write(path, schema(record), batches)
    return datasets.Dataset.from_file(str(path))


class Rubrics(Mapping[str, tuple[Demand, ...]]):
    """The criteria of every image that has some, by its key. Memory has the keys."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        import numpy as np
        import pyarrow as pa

        part = pa.schema([schema(Rubric).field("key"), schema(Rubric).field("criteria")])
        _write(path, part, _usable(files, part.names))
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        chunks = [np.array(chunk.to_pylist(), "S") for chunk in table["key"].chunks]
        keys = np.concatenate([np.array([], "S1"), *chunks])
        self._rows = np.argsort(keys)
        self._keys = keys[self._rows]
        self._criteria = lru_cache(KEPT_RUBRICS)(
            lambda row: tuple(Demand(**one) for one in table["criteria"][row].as_py())
        )

    def __getitem__(self, key: str) -> tuple[Demand, ...]:
        if key not in self:
            raise KeyError(key)
        criteria: tuple[Demand, ...] = self._criteria(int(self._rows[self._place(key)]))
        return criteria

    def __contains__(self, key: object) -> bool:
        place = self._place(str(key))
        return place < len(self) and bool(self._keys[place] == str(key).encode())

    def _place(self, key: str) -> int:
        return int(self._keys.searchsorted(key.encode()))

    def __iter__(self) -> Iterator[str]:
        return (key.decode() for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _usable(files: Iterable[Path], names: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc

    for file in files:
        for batch in tables.batches(file, Rubric):
            yield batch.filter(pc.equal(batch["status"], "ok")).select(names)


def _write(path: Path, columns: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    import pyarrow as pa

    with tables.atomic(path, durable=False) as file, pa.ipc.new_stream(file, columns) as writer:
        for batch in batches:
            writer.write_batch(batch)
