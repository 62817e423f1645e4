"""Paths of tables and of unfinished work within a run folder."""

from __future__ import annotations

from pathlib import Path

PACKED = "shards"  # the folder of the tars that ingest writes


def table_path(run: Path, folder: str, shard: int) -> Path:
    return run / folder / f"{shard:05d}.parquet"


def work_folder(run: Path, folder: str, shard: int) -> Path:
    """Where what is unfinished of a table's shard lies: outside every table's glob, gone when the table is there."""
    return run / ".work" / folder / f"{shard:05d}"
