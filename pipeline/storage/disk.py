"""Durable files and folders: they are synced here, early and several at once, to survive a power failure.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

NUM_SYNCS = 8  # at once
MANY = 100  # files from which one sync of their file system takes less time than one of each
START = 2  # SYNC_FILE_RANGE_WRITE of Linux


def make_folder(folder: Path) -> None:
    """Creates a folder with its parents, if it is missing; what is created survives a power failure."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_path(folder.parent)


def sync_path(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes a folder and everything below it survive a power failure."""
    paths = list(_list_tree(folder))
    if len(paths) >= MANY and _sync_file_system(folder):
        return
    with ThreadPoolExecutor(NUM_SYNCS) as threads:
        for _ in threads.map(sync_path, paths):
            pass


def _sync_file_system(folder: Path) -> bool:
    """Syncs the file system that holds the folder; False where the system has no such call."""
    if not (call := _find_call("syncfs", ctypes.c_int)):
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        if call(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)
    return True


def _list_tree(folder: Path) -> Iterator[Path]:
    for place, _, files in os.walk(folder):
        yield from (Path(place, name) for name in (*files, "."))


def start_writing(handle: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Has the disk begin to write a part of an open file, so that a later sync waits less; 0 bytes: to its end.

    A hint: where the system has no such call, nothing happens.
    """
    if call := _find_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint):
        call(handle, offset, num_bytes, START)


@cache
def _find_call(name: str, *types: Any) -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call:
        call.argtypes = types
    return call
