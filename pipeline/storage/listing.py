"""Decides how a folder of a hundred thousand files is looked at: by its handle, and if need be in a process of its own.

The way to the folder is long, and no file needs to go it. Python's threads wait for each other; this file is a program
too, which imports next to nothing, so that several folders can be looked at at once. What files are, it does not know.
"""

from __future__ import annotations

import os
import sys
from array import array

ABOUT = ("shard", "mtime", "size", "inode")  # of a file; the time in nanoseconds


def list_files(pattern: str) -> array[int]:
    """ABOUT of each file that matches, file after file, in no order.

    Args:
        pattern: FOLDER/*.SUFFIX, where * is the number of a shard.
    """
    folder, _, suffix = pattern.rpartition("/*")
    found = array("q")
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return found
    try:
        for name in os.listdir(handle):  # noqa: PTH208
            if name.endswith(suffix) and (number := name[: -len(suffix)]).isdigit():
                try:
                    about = os.stat(name, dir_fd=handle)
                except FileNotFoundError:  # it was there a moment ago
                    continue
                found.extend((int(number), about.st_mtime_ns, about.st_size, about.st_ino))
    finally:
        os.close(handle)
    return found


if __name__ == "__main__":
    sys.stdout.buffer.write(list_files(sys.argv[1]).tobytes())
