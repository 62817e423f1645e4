"""Durable files and folders: they are synced here, early and several at once, to survive a power failure.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

NUM_SYNCS = 8  # at once
FILES_PER_TASK = 32
START = 2  # SYNC_FILE_RANGE_WRITE of Linux


def make_folder(folder: Path) -> None:
    """Creates a folder with its parents, if it is missing; what is created survives a power failure."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_path(folder.parent)


def sync_path(path: Path | str) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes a folder and everything below it survive a power failure."""
    with ThreadPoolExecutor(NUM_SYNCS) as threads:
        for _ in threads.map(_sync_paths, _list_parts(folder)):
            pass


def _sync_paths(paths: Iterable[str]) -> None:
    for path in paths:
        sync_path(path)


def _list_parts(folder: Path) -> Iterator[Sequence[str]]:
    """The paths of a folder and all below it, some at a time: a task of its own for each costs more than its sync."""
    paths = (f"{place}/{name}" for place, _, files in os.walk(folder) for name in (*files, "."))
    while part := list(islice(paths, FILES_PER_TASK)):
        yield part


def start_writing(handle: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Has the disk begin to write a part of an open file, so that a later sync waits less; 0 bytes: to its end.

    A hint: where the system has no such call, nothing happens.
    """
    if call := _find_call():
        call(handle, offset, num_bytes, START)


@cache
def _find_call() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
