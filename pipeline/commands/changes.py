"""Files of the corpus that were edited after they were ingested, for `recap plan`.

Times and sizes say which may have been; only an image whose texts or bytes differ from its row is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING

from pipeline.errors import MachineError
from pipeline.progress import say
from pipeline.records import FileStatus, Image, Piece, Raw
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from pipeline.storage.plan import Plan

if TYPE_CHECKING:
    import pyarrow as pa

NO_METADATA = "{}"
BATCH = 10_000  # files


def find_edited(run: Run) -> Iterator[tuple[int, str]]:
    """The shard and name of each image that has other texts or bytes than when it was ingested.

    A new sample in a file of many is named too, and so is one that is gone where its shard has no other file.
    """
    list_statuses = getattr(run.source.module, "list_statuses", None)
    plan, shards = Plan.load(run.folder / "plan.parquet")
    made = {shard: time for shard in shards if (time := _find_time(run, shard)) is not None}
    if list_statuses is None or not made:
        return
    for shard, files in _find_suspects(plan.rows, list_statuses(run.source.config), made):
        pieces = plan.pieces(shard)
        suspects = [piece for piece in pieces if piece.file in files]
        edited = {file for file, is_edited in files.items() if is_edited}
        if hasattr(run.source.module, "read_texts"):
            names = _compare_images(run, shard, suspects, edited=edited)
        else:
            names = _compare_samples(run, shard, suspects, is_whole=len(suspects) == len(pieces))
        yield from ((shard, name) for name in names)


def _find_time(run: Run, shard: int) -> float | None:
    """When a shard was ingested; None if it was not."""
    try:
        return table_path(run.folder, "image", shard).stat().st_mtime
    except FileNotFoundError:
        return None


def _find_suspects(
    rows: pa.Table, statuses: Iterable[FileStatus], made: Mapping[int, float]
) -> Iterator[tuple[int, dict[str, bool]]]:
    """Each shard with files that may be others now than when it was ingested; True for a file that itself may be."""
    import pyarrow as pa
    import pyarrow.compute as pc

    times = pa.table({"shard": pa.array(made.keys(), rows.schema.field("shard").type), "made_at": list(made.values())})
    planned = rows.select(["shard", "file", "num_bytes"]).join(times, "shard", join_type="inner")
    remaining = iter(statuses)
    batches = iter(lambda: list(islice(remaining, BATCH)), [])
    listed = pa.concat_tables([_make_table(batch, rows.schema) for batch in chain([[]], batches)])
    both = planned.join(listed, "file", join_type="inner")
    has_other_size = pc.fill_null(pc.not_equal(both["num_bytes"], both["size"]), False)
    edited = pc.or_(pc.greater(both["changed_at"], both["made_at"]), has_other_size)
    both = both.append_column("edited", edited)
    found = both.filter(pc.or_(edited, pc.greater(both["lost_at"], both["made_at"]))).sort_by("shard")
    files = zip(*(found[name].to_pylist() for name in ("shard", "file", "edited")), strict=True)
    for shard, group in groupby(files, key=itemgetter(0)):
        yield shard, {file: is_edited for _, file, is_edited in group}


def _make_table(statuses: Sequence[FileStatus], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = {
        "file": pa.array([one.file for one in statuses], schema.field("file").type),
        "changed_at": pa.array([one.changed_at for one in statuses], pa.float64()),
        "lost_at": pa.array([one.lost_at for one in statuses], pa.float64()),
        "size": pa.array([one.num_bytes for one in statuses], schema.field("num_bytes").type),
    }
    return pa.table(columns)


def _compare_images(run: Run, shard: int, pieces: Sequence[Piece], *, edited: Set[str]) -> Iterator[str]:
    """The names of the pieces, files of one image, that differ from their rows.

    Bytes are read of those in `edited` alone, and texts of others only where there were any.
    """
    by_name, source = {piece.file: piece for piece in pieces}, run.source
    for row in (row for row in _read_images(run, shard) if row.source_key in by_name):
        piece, is_edited = by_name[row.source_key], row.source_key in edited
        if not is_edited and not row.alt_text and row.metadata == NO_METADATA:
            continue
        raws = (
            source.module.read(piece, source.config) if is_edited else [source.module.read_texts(piece, source.config)]
        )
        if any(_differs(raw, row, has_bytes=is_edited) for raw in raws):
            yield row.source_key


def _compare_samples(run: Run, shard: int, pieces: Sequence[Piece], *, is_whole: bool) -> Iterator[str]:
    """The names of the samples of pieces of many that differ from their rows.

    Args:
        run: whose corpus is compared.
        shard: the rows.
        pieces: of the shard.
        is_whole: they are all of its pieces, so that rows without a sample show that one is gone.
    """
    rows = {row.source_key: row for row in _read_images(run, shard)}
    for piece in pieces:
        try:
            for raw in run.source.module.read(piece, run.source.config):
                row = rows.pop(raw.source_key, None)
                if row is None or _differs(raw, row, has_bytes=True):
                    yield raw.source_key
        except MachineError as error:  # it has been rewritten, and to ingest it again would fail too
            say(f"recap: {error}")
            is_whole = False
    if is_whole:
        yield from rows


def _read_images(run: Run, shard: int) -> Iterator[Image]:
    return tables.read_rows(table_path(run.folder, "image", shard), Image)


def _differs(raw: Raw, row: Image, *, has_bytes: bool) -> bool:
    digest = None if raw.data is None else hashlib.sha256(raw.data).hexdigest()
    has_other_bytes = has_bytes and row.sha256 not in (None, digest)
    has_moved = has_bytes and raw.offset is not None and row.offset is not None and raw.offset != row.offset
    return has_other_bytes or has_moved or (raw.alt_text, raw.metadata) != (row.alt_text, row.metadata)
