"""The files of a repartitioned training set: of a wanted size, in the plan's order or shuffled.

The rows of all shards alone decide each file, so that it does not depend on the process that writes it. Memory holds a
histogram of sizes and one chunk of rows: `divide` sorts chunks and keeps them in a folder, and `read_file` merges from
them the rows of one file. Neither knows forms or images.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.execution.passes import AllShards
from pipeline.records import Selected, column_names
from pipeline.storage import tables

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    Array = npt.NDArray[Any]

NUM_BINS = 1 << 20  # of a histogram
PLACE_BITS = 64
CHUNK_BYTES = 1 << 28  # of rows that are sorted in memory
ROWS_AT_ONCE = 500  # of one chunk, while a file is read
FILES = "files.json"


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file of the training set, in each of its forms."""

    part: int
    split: str
    number: int  # within the split
    start: int  # the first place that it may have
    stop: int  # the place after its last one


class SizeHistogram:
    """Bytes by place, in bins that grow wider as places grow; memory does not grow."""

    def __init__(self, shift: int) -> None:
        """`shift` is the bits of a place by which a bin is wider than one."""
        import numpy as np

        self._shift, self._bins = shift, np.zeros(NUM_BINS, np.int64)

    def add(self, places: Array, sizes: Array) -> None:
        import numpy as np

        while int(places.max()) >> self._shift >= NUM_BINS:
            merged = self._bins[0::2] + self._bins[1::2]
            self._bins = np.concatenate((merged, np.zeros(NUM_BINS // 2, np.int64)))
            self._shift += 1
        np.add.at(self._bins, (places >> np.uint64(self._shift)).astype(np.int64), sizes)

    @property
    def num_bytes(self) -> int:
        return int(self._bins.sum())

    def split(self, num: int) -> list[int]:
        """The first places of at most `num` ranges with about as many bytes each; none is empty."""
        import numpy as np

        filled = np.flatnonzero(self._bins)
        sizes = self._bins[filled]
        middles = np.cumsum(sizes) - sizes / 2
        wanted = np.arange(1, num) * (sizes.sum() / num)
        starts = np.unique(np.searchsorted(middles, wanted))
        inner = starts[(starts > 0) & (starts < len(filled))]
        return [0, *(int(start) << self._shift for start in filled[inner])]


def divide(
    shards: AllShards, folder: Path, *, source: str, seed: int | None, file_bytes: int, splits: Sequence[str]
) -> None:
    """Reads the selected samples of all shards and writes, into a folder, the files that they belong to.

    Args:
        source: the folder of the tables of `Selected`.
        seed: of the order; None: the plan's.
        file_bytes: wanted for a file; 0: as many files as there are shards.
        splits: of the training set; the one of a part is found in its rows.
    """
    import numpy as np

    sizes: dict[int, SizeHistogram] = {}
    names: dict[int, str] = {}
    writer, num_seen = ChunkWriter(folder), dict[int, int]()
    for _, batches in shards.read_tables(source, Selected, column_names(Selected)):
        for batch in batches:
            parts = batch.column("part").to_numpy()
            places = np.zeros(len(batch), np.uint64)
            for part in map(int, np.unique(parts)):
                own = np.flatnonzero(parts == part)
                names[part] = batch.column("split")[int(own[0])].as_py()
                if seed is None:
                    places[own] = np.arange(num_seen.get(part, 0), num_seen.get(part, 0) + len(own), dtype=np.uint64)
                    num_seen[part] = num_seen.get(part, 0) + len(own)
                else:
                    places[own] = shuffle_keys(batch.column("key").take(own).to_pylist(), seed)
                if part not in sizes:
                    sizes[part] = SizeHistogram(0 if seed is None else PLACE_BITS - NUM_BINS.bit_length() + 1)
                sizes[part].add(places[own], batch.column("num_estimated").to_numpy()[own])
            writer.add(batch, parts, places)
    writer.flush()
    total = sum(one.num_bytes for one in sizes.values())
    file_bytes = file_bytes or -(-total // shards.num_shards)
    files = list(_list_files(sizes, names, file_bytes, splits))
    values = {"num_shards": shards.num_shards, "files": [asdict(file) for file in files]}
    (folder / FILES).write_text(json.dumps(values))


def _list_files(
    sizes: dict[int, SizeHistogram], names: dict[int, str], file_bytes: int, splits: Sequence[str]
) -> Iterator[OutputFile]:
    """The files in the order of their ids: by the split's name, its parts, and place."""
    for split in sorted(splits):
        numbers = count()
        for part in sorted(part for part in sizes if names[part] == split):
            starts = sizes[part].split(max(1, -(-sizes[part].num_bytes // file_bytes)))
            for start, stop in zip(starts, [*starts[1:], 1 << PLACE_BITS], strict=True):
                yield OutputFile(part=part, split=split, number=next(numbers), start=start, stop=stop)


def shuffle_keys(keys: Sequence[str], seed: int) -> Array:
    """A place for each key, 64 bits: a permutation that depends on the seed alone, so that no two keys share one."""
    import numpy as np

    salt = np.frombuffer(hashlib.sha256(f"shuffle {seed}".encode()).digest()[:8], "<u8")[0]
    return _mix(_mix(np.array(keys).astype(np.uint64)) ^ salt)


def _mix(values: Array) -> Array:
    """The finaliser of SplitMix64, which maps 64 bits to 64 bits one to one."""
    import numpy as np

    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed


class ChunkWriter:
    """Sorts rows by part and place in chunks, each of them an Arrow file and an array of its parts and places."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_chunks, self._num_bytes = folder, 0, 0
        self._batches: list[pa.RecordBatch] = []
        self._places: list[Array] = []

    def add(self, batch: pa.RecordBatch, parts: Array, places: Array) -> None:
        import numpy as np

        rows = np.empty(len(batch), PLACE_TYPE)
        rows["part"], rows["place"] = parts, places
        self._batches.append(batch)
        self._places.append(rows)
        self._num_bytes += batch.nbytes
        if self._num_bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are in memory as one chunk."""
        import numpy as np
        import pyarrow as pa

        if not self._batches:
            return
        places = np.concatenate(self._places)
        order = np.lexsort((places["place"], places["part"]))
        table = pa.Table.from_batches(self._batches).take(order).combine_chunks()
        with pa.ipc.new_file(str(self._folder / f"{self._num_chunks:05d}.arrow"), table.schema) as file:
            file.write_table(table)
        np.save(self._folder / f"{self._num_chunks:05d}.npy", places[order])
        self._batches, self._places, self._num_bytes = [], [], 0
        self._num_chunks += 1


PLACE_TYPE = [("part", "i4"), ("place", "u8")]


def list_own_files(folder: Path, shard: int) -> list[OutputFile]:
    """The files that one shard of the run writes: all shards write as many, give or take one."""
    values = json.loads((folder / FILES).read_text())
    files, num_shards = [OutputFile(**one) for one in values["files"]], values["num_shards"]
    return files[shard * len(files) // num_shards : (shard + 1) * len(files) // num_shards]


def read_file(folder: Path, file: OutputFile) -> Iterator[Selected]:
    """The samples of a file, in its order."""
    chunks = (_read_chunk(path, file) for path in sorted(folder.glob("*.arrow")))
    for _, row in heapq.merge(*chunks, key=lambda placed: placed[0]):
        yield row


def _read_chunk(path: Path, file: OutputFile) -> Iterator[tuple[int, Selected]]:
    """The rows of one chunk that belong to a file, with their places."""
    import numpy as np
    import pyarrow as pa

    places = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    first, end = (int(np.searchsorted(places["part"], file.part, side=side)) for side in ("left", "right"))
    own = places["place"][first:end]
    last = np.uint64(file.stop - 1)
    start = first + int(np.searchsorted(own, np.uint64(file.start)))
    stop = first + int(np.searchsorted(own, last, side="right"))
    if start == stop:
        return
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        for at in range(start, stop, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, stop - at)
            (batch,) = table.slice(at, size).combine_chunks().to_batches()
            rows: Iterable[Selected] = tables.from_arrow(Selected, batch)
            yield from zip(places["place"][at : at + size].tolist(), rows, strict=True)
