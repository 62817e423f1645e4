"""Decides how a stage sees one shard: its tables as records, as SQL, and the bytes of its images.

Everything is read in file order and a little at a time, so that memory does not grow with the shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import BrokenTableError
from pipeline.records import Image, Raw, Record
from pipeline.sections import Run
from pipeline.storage import database, tables, views
from pipeline.storage.layout import PACKED, table_path
from pipeline.storage.plan import Plan

R = TypeVar("R", bound=Record)


@dataclass(kw_only=True)
class Shard:
    """One shard of a run, as it is on disk now. Not for use by two threads at once, except `read_image`."""

    run: Run
    plan: Plan
    number: int
    limit: int | None = None  # inputs that are read of the corpus, for a trial
    retry_of: tuple[str, ...] = ()  # digest of the table whose failed rows are asked for again, with other seeds
    _open: dict[str, int] = field(default_factory=dict)  # file -> handle

    def read_table(self, folder: str, record: type[R]) -> Iterator[R]:
        return tables.read_rows(table_path(self.run.folder, folder, self.number), record)

    def lookup(self, folder: str, record: type[R]) -> Callable[[str], tuple[R, ...]]:
        """What a table has of a key, which may be nothing; keys are asked for in ascending order."""
        by_key = groupby(self.read_table(folder, record), key=lambda row: str(row.id[0]))
        groups = ((key, tuple(rows)) for key, rows in by_key)
        first = next(groups, None)

        def of(key: str) -> tuple[R, ...]:
            nonlocal first
            while first is not None and first[0] < key:
                first = next(groups, None)
            return first[1] if first is not None and first[0] == key else ()

        return of

    def query(self, sql: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a SELECT over this shard's own tables (see manifests/views.sql), of passes that there are."""
        connection = views.connect(self.run, files=f"{self.number:05d}.parquet")
        try:
            yield from database.query_rows(connection, sql)
        finally:
            connection.close()

    def read_inputs(self) -> Iterator[Raw]:
        """The inputs of the plan, read from the corpus, in the plan's order."""
        source = self.run.source
        pieces = self.plan.pieces(self.number)
        return islice((raw for piece in pieces for raw in source.module.read(piece, source.config)), self.limit)

    def read_image(self, image: Image) -> bytes:
        """The image file's bytes.

        Raises:
            OSError: the tar has gone or has changed since ingest; the message says which.
            BrokenTableError: the same, and it is a tar of ours: ingest can make it, and its table, again.
        """
        assert image.file is not None and image.offset is not None and image.num_bytes is not None
        data = os.pread(self._handle(image.file), image.num_bytes, image.offset)
        if hashlib.sha256(data).hexdigest() != image.sha256:
            end = image.offset + image.num_bytes
            why = f"{image.file} has not {image.source_key} at bytes {image.offset} to {end}: it changed since ingest"
            if Path(image.file).parts[0] == PACKED:
                raise BrokenTableError(table_path(self.run.folder, "image", self.number), f"has lost images: {why}")
            raise OSError(why)
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, file: str) -> int:
        if file not in self._open:
            self.close()  # a shard's images lie in file order: one open file is enough
            self._open[file] = os.open(self.locate(file), os.O_RDONLY)
            os.posix_fadvise(self._open[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[file]

    def locate(self, file: str) -> Path:
        """Where a file of images lies now. A corpus may have been moved since ingest; its plan is named from within."""
        if not Path(file).is_absolute():
            return self.run.folder / file
        planned = [piece.file for piece in self.plan.pieces(self.number) if file.endswith(f"/{piece.file}")]
        return Path(self.run.source.place(max(planned, key=len, default=file)))
