"""Files of the corpus that were edited after they were ingested, for `recap plan`.

Times say which may have been; only one whose texts or bytes differ from its row is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Set

from pipeline.records import Image, Piece
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from pipeline.storage.plan import Plan

NO_METADATA = "{}"


def find_edited(run: Run) -> Iterator[tuple[int, str]]:
    """The shard and name of each planned file that has other texts or another image than when it was ingested."""
    find_times = getattr(run.source.module, "find_times", None)
    plan, shards = Plan.load(run.folder / "plan.parquet")
    made = {shard: time for shard in shards if (time := _find_time(run, shard)) is not None}
    if find_times is None or not made:
        return
    oldest = min(made.values())
    newer = {file: times for file, *times in find_times(run.source.config) if max(times) > oldest}
    for shard, time in made.items() if newer else ():
        pieces = [piece for piece in plan.pieces(shard) if max(newer.get(piece.file, (0.0,))) > time]
        edited = {piece.file for piece in pieces if newer[piece.file][0] > time}
        if pieces:
            yield from ((shard, file) for file in _compare_files(run, shard, pieces, edited=edited))


def _find_time(run: Run, shard: int) -> float | None:
    """When a shard was ingested; None if it was not."""
    try:
        return table_path(run.folder, "image", shard).stat().st_mtime
    except FileNotFoundError:
        return None


def _compare_files(run: Run, shard: int, pieces: Sequence[Piece], *, edited: Set[str]) -> Iterator[str]:
    """The names of the pieces that differ from their rows. Bytes are read of those in `edited` alone, and texts of
    others only where there were any."""
    by_name, source = {piece.file: piece for piece in pieces}, run.source
    rows = tables.read_rows(table_path(run.folder, "image", shard), Image)
    for row in (row for row in rows if row.source_key in by_name):
        piece, is_edited = by_name[row.source_key], row.source_key in edited
        if not is_edited and not row.alt_text and row.metadata == NO_METADATA:
            continue
        raws = (
            source.module.read(piece, source.config) if is_edited else [source.module.read_texts(piece, source.config)]
        )
        for raw in raws:
            digest = None if raw.data is None else hashlib.sha256(raw.data).hexdigest()
            has_other_bytes = is_edited and row.sha256 not in (None, digest)
            if has_other_bytes or (raw.alt_text, raw.metadata) != (row.alt_text, row.metadata):
                yield row.source_key
