"""Paths of tables and of unfinished work within a run folder."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

PACKED = "shards"  # folder of the tars that ingest writes
CERTIFICATE = "audit/certificate.json"  # of the guarantee that `recap audit` found
UNFINISHED = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}\.tmp")
NUMBERED = re.compile(r"(\d{5,})(?:\..*)?")  # names of files and folders of export
STALE_AGE = 3600.0  # seconds since an unfinished file was last written after which its writer counts as gone


def table_path(run: Path, folder: str, shard: int) -> Path:
    return run / folder / f"{shard:05d}.parquet"


def work_folder(run: Path, folder: str, shard: int) -> Path:
    """Folder of a table's unfinished work: outside every table's glob, and removed once the table is in place."""
    return run / ".work" / folder / f"{shard:05d}"


def unfinished_path(path: Path, *, work: Path) -> Path:
    """A new name in `work` for a file that will be renamed to `path`; it carries the host and process that write it."""
    return work / f".{path.name}.{_hash_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp"


def sweep_unfinished(folder: Path) -> None:
    """Removes unfinished files and folders in a folder whose writer is gone."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if not _is_stale(path):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def find_numbers(name: str) -> list[str]:
    """The numbers of files in a path: 00012.tar, 00012.tar.idx, 00012/index.json.

    >>> find_numbers("export/messages/images/00012/000007000042.jpg")
    ['00012']
    """
    return [match[1] for match in map(NUMBERED.fullmatch, name.split("/")) if match][:1]


def is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > STALE_AGE


def _is_stale(path: Path) -> bool:
    """True if the writer was a process of this host that is gone, or has not written for long."""
    writer = UNFINISHED.fullmatch(path.name)
    if writer and writer["host"] == _hash_host() and not Path(f"/proc/{writer['pid']}").exists():
        return True
    return is_old(path)


def _hash_host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
