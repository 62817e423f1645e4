"""Paths of tables and of unfinished work within a run folder."""

from __future__ import annotations

from pathlib import Path

PACKED = "shards"  # folder of the tars that ingest writes


def table_path(run: Path, folder: str, shard: int) -> Path:
    return run / folder / f"{shard:05d}.parquet"


def work_folder(run: Path, folder: str, shard: int) -> Path:
    """Folder of a table's unfinished work: outside every table's glob, and removed once the table is in place."""
    return run / ".work" / folder / f"{shard:05d}"
