"""The contract between a stage and the machine: passes, and the shard that a pass reads.

A stage is a module of stages/ with

- `passes(run: Run) -> Iterable[Pass]`: its passes, from its sections of run.toml;
- `Config`, if it has a section; `NAMED = True` if that section holds named passes.

A pass carries the stage's two functions: `inputs` reads a shard's tables and yields one input for each row to make;
`work` turns inputs into rows, one each, in order. Neither knows about output paths, resumption or other shards.

A pass whose rows depend on other shards names their tables in `reads_all`. Its `prepare` reads them once for the whole
run and fills a folder, from which each shard takes its part (`Shard.ensure_shared`).
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.engines import Engine
from pipeline.errors import BrokenTableError, StoppedError
from pipeline.records import Image, Piece, Raw, Record
from pipeline.sections import Plugin, Run
from pipeline.storage import database, tables
from pipeline.storage.layout import PACKED, table_path

if TYPE_CHECKING:
    import pyarrow as pa

R = TypeVar("R", bound=Record)
T = TypeVar("T")
COPIES = "copies"  # the part of a pass that gives rows to the images that share those of others
NUM_READERS = 16  # requests at once for the files of a remote folder


class Input(Protocol):
    """The input of one row."""

    @property
    def id(self) -> tuple[str | int, ...]:
        """The id of that row."""


class Payload(Protocol):
    """Files beside the table of one shard; pipeline/storage/payloads.py has what they are made of."""

    def take(self, output: Any) -> Record:
        """Writes what the output carries and returns its row."""

    def commit(self) -> Mapping[str, int]:
        """Puts the files in place; returns path relative to the run -> bytes, for the table's footer."""

    def abandon(self) -> None:
        """Removes what was written."""


@dataclass(kw_only=True)
class Shard:
    """One shard of a run, as it is on disk now. Read in file order and a little at a time, so memory does not grow.

    Only `read_image` may be called by several threads at once.
    """

    run: Run
    number: int
    pieces: Sequence[Piece]  # of the corpus, as planned
    limit: int | None = None  # inputs that are read from the corpus, for a preview
    retry_of: tuple[str, ...] = ()  # digest of the table whose failed rows are retried, with different seeds
    ensure_shared: Callable[[], Path] | None = None  # the folder that the pass's `prepare` filled
    _open: dict[Path, int] = field(default_factory=dict)  # of tars, file -> handle

    def read_table(self, folder: str, record: type[R]) -> Iterator[R]:
        return tables.read_rows(table_path(self.run.folder, folder, self.number), record)

    def lookup(self, folder: str, record: type[R]) -> Callable[[str], tuple[R, ...]]:
        """A function from a key to its rows in a table, if any. Keys must be looked up in ascending order."""
        return lookup_rows(self.read_table(folder, record), lambda row: str(row.id[0]))

    def query(
        self, sql: str, *, views: Mapping[str, pa.Table] | None = None, threads: int = 2
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of a SELECT over this shard's own tables (see manifests/views.sql), and more tables by name.

        With one thread, rows that the SELECT does not order come in the same order each time.
        """
        with database.connect_run(self.run, files=f"{self.number:05d}.parquet", threads=threads) as connection:
            for name, table in (views or {}).items():
                connection.duck.register(name, table)
            yield from database.query_rows(connection, sql)

    def read_inputs(self) -> Iterator[Raw]:
        """The planned samples, read from the corpus, in the plan's order."""
        source = self.run.source
        is_remote = any("://" in source.place(piece.file) for piece in self.pieces[:1])
        if is_remote and all(piece.num_samples == 1 for piece in self.pieces):
            return islice(_read_ahead(source, self.pieces), self.limit)
        return islice((raw for piece in self.pieces for raw in source.module.read(piece, source.config)), self.limit)

    def read_image(self, image: Image, *, path: Path | None = None) -> bytes:
        """The image file's bytes.

        Args:
            image: of this shard, or of another one with `path`.
            path: of the file that has the bytes; by default as this shard's plan names it.

        Raises:
            OSError: the file is missing or has changed since ingest.
            BrokenTableError: as OSError, for a tar that ingest wrote and can write again.
        """
        assert image.file is not None and image.offset is not None and image.num_bytes is not None
        if path is not None or image.offset == 0:  # a file of its own, since a tar begins with a header
            with open(path or self.locate(image), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), image.num_bytes, image.offset)
        else:
            data = os.pread(self._open_file(self.locate(image)), image.num_bytes, image.offset)
        if hashlib.sha256(data).hexdigest() != image.sha256:
            end = image.offset + image.num_bytes
            where = path or self.locate(image)
            why = f"{where} changed since ingest: {image.source_key} is not at bytes {image.offset} to {end}"
            table = table_path(self.run.folder, "image", image.shard)
            if Path(image.file).parts[0] == PACKED:
                raise BrokenTableError(table, f"has lost images: {why}")
            raise OSError(f"{why}; restore it, or remove {table}: ingest then reads it as it is now")
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _open_file(self, path: Path) -> int:
        if path not in self._open:
            self.close()  # images are read in file order, so one open file is enough
            self._open[path] = os.open(path, os.O_RDONLY)
            os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[path]

    def locate(self, image: Image) -> Path:
        """The current path of an image's file. A corpus may have moved since ingest; the plan has relative names."""
        return self.place(image.file or "", self.find_name(image))

    def place(self, file: str, name: str) -> Path:
        """The current path of a file: `file` as an image's row has it, `name` as the plan has it."""
        return Path(self.run.source.place(name)) if Path(file).is_absolute() else self.run.folder / name

    def find_name(self, image: Image) -> str:
        """The plan's name for an image's file, or the file itself where the plan does not have it."""
        file = image.file
        assert file is not None
        if not Path(file).is_absolute():
            return file
        if image.source_key in self._planned and file.endswith(f"/{image.source_key}"):  # a file of its own
            return image.source_key
        parts = file.split("/")
        names = ("/".join(parts[start:]) for start in range(len(parts)))  # the longest first
        return next((name for name in names if name in self._planned), file)

    @cached_property
    def _planned(self) -> frozenset[str]:
        return frozenset(piece.file for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class AllShards:
    """The tables of all shards of a run, for `Pass.prepare`."""

    run: Run
    num_shards: int
    stop: Event  # set when a signal came

    def read_tables(
        self, folder: str, record: type[Record], columns: Sequence[str]
    ) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
        """Every shard in order, with these columns of its table, a few rows in memory at a time.

        Raises:
            StoppedError: a signal came.
            BrokenTableError: a table is damaged.
        """
        for shard in range(self.num_shards):
            self.check_stop()
            yield shard, tables.read_batches(table_path(self.run.folder, folder, shard), record, columns=columns)

    def check_stop(self) -> None:
        """
        Raises:
            StoppedError: a signal came.
        """
        if self.stop.is_set():
            raise StoppedError


def lookup_rows(rows: Iterable[T], find_key: Callable[[T], str]) -> Callable[[str], tuple[T, ...]]:
    """A function from a key to its rows, if any. Rows are sorted by key; keys must be looked up in ascending order."""
    groups = ((key, tuple(group)) for key, group in groupby(rows, key=find_key))
    current = next(groups, None)

    def find_rows(key: str) -> tuple[T, ...]:
        nonlocal current
        while current is not None and current[0] < key:
            current = next(groups, None)
        return current[1] if current is not None and current[0] == key else ()

    return find_rows


def whole_input(folder: str) -> str:
    """The name, among a table's inputs, of the tables of all shards in a folder."""
    return f"{folder}/*"


def _read_ahead(source: Plugin, pieces: Iterable[Piece]) -> Iterator[Raw]:
    """The samples of small remote pieces in order, several requested at once: each request takes long."""
    remaining = iter(pieces)

    def read(piece: Piece) -> list[Raw]:
        return [*source.module.read(piece, source.config)]

    with ThreadPoolExecutor(NUM_READERS) as pool:

        def start(num: int) -> list[Future[list[Raw]]]:
            return [pool.submit(read, piece) for piece in islice(remaining, num)]

        pending = deque(start(2 * NUM_READERS))
        try:
            while pending:
                yield from pending.popleft().result()
                pending += start(1)
        finally:
            pool.shutdown(cancel_futures=True)


def no_payload(_: Shard) -> None:
    return None


Work = Callable[[Iterator[Any], Mapping[str, Engine]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One table to make, shard by shard, and everything that decides its rows."""

    stage: str
    name: str = ""  # NAME in run.toml; "" where the stage has a single pass
    caption: str = ""  # for scores: the caption pass that is scored
    part: str = ""  # of the pass, where one of these names makes several tables of a shard
    folder: str  # of its tables, relative to the run
    reads: tuple[str, ...] = ()  # folders of the tables it reads, of its own shard; ingest reads the plan
    reads_all: tuple[str, ...] = ()  # folders of the tables that it reads of all shards; such a pass has `reads` too
    prepare: Callable[[AllShards, Path], None] | None = field(default=None, repr=False)  # fills a folder for all shards
    engines: tuple[str, ...] = ()  # names in [engines] that it uses
    overlaps: bool = False  # two shards are made at a time though it uses no engine, since each waits for the disk
    shows_images: bool = False  # whether its requests hold images, which its engines must then take
    blind_engines: tuple[str, ...] = ()  # those of its engines that are sent none all the same
    version: int  # of the stage; raised when equal inputs give different rows
    slice: Mapping[str, Any]  # JSON values: the part of the configuration that decides rows
    record: type[Record]
    max_error_share: float  # [0, 1]
    inputs: Callable[[Shard], Iterator[Any]] = field(repr=False)
    work: Work = field(repr=False)
    payload: Callable[[Shard], Payload | None] = field(default=no_payload, repr=False)  # files beside the table
    restore: Callable[[Shard, Any], Any] | None = field(default=None, repr=False)  # the output that has a finished row
    finish: Callable[[Run, bool], None] | None = field(default=None, repr=False)  # after the last shard; True: some new
    whole_files: tuple[str, ...] = ()  # of the whole run, relative to it, that `finish` writes
    check: Callable[[], None] | None = field(default=None, repr=False)  # raises early what its work would raise late
    close: Callable[[], None] | None = field(default=None, repr=False)  # releases what its work holds open

    @property
    def depends_on(self) -> tuple[str, ...]:
        """The folders of all tables that it reads."""
        return (*self.reads, *self.reads_all)

    @property
    def title(self) -> str:
        """As users write it: STAGE, STAGE:NAME, or STAGE:NAME:CAPTION, and the part, if any."""
        return ":".join(part for part in (self.stage, self.name, self.caption, self.part) if part)
