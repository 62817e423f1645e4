"""The machine's cores, memory and fast number formats, and which errors are its trouble rather than the data's.

A failed allocation looks like damage in many libraries. So an error counts as the data's only if it comes again when it
is tried a second time, alone and with memory to spare.
"""

from __future__ import annotations

import errno
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.errors import MachineError, OutOfMemoryError

SPARE_BYTES = 256 << 20  # of free memory, with which a file or table is read
SHORTAGES = (  # in messages of errors that are no MemoryError: threads, shared libraries, zstd, torch, C++, DuckDB
    "can't start new thread",
    "failed to map segment",
    "Allocation error",
    "can't allocate memory",
    "bad_alloc",
    "Out of Memory Error",
)
GROUP_FILES = {  # of a control group, by its controllers in /proc/self/cgroup: the limit and what is used of it
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
# Arrow reads this when it is first imported. Its own allocators keep more memory: tests/support/answer_fuzzer.py.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
_alone = threading.RLock()  # held while something is tried a second time


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def emulates_bfloat16() -> bool:
    """True if bfloat16 products take this CPU three to ten times as long as float32, for want of instructions.

    oneDNN runs them on any AVX-512, so its own check is not enough on x86. Torch has no public name for the checks.
    """
    import torch

    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not has_instructions


def free_memory() -> int:
    """The bytes that this process may still allocate, by the system, its control groups and its own limit."""
    import resource

    sizes = [1 << 62, *_list_group_sizes()]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError):
            limit -= int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        sizes.append(limit)
    return max(0, min(sizes))


def _list_group_sizes() -> Iterator[int]:
    """The bytes that each control group of this process leaves; file caches, which give way, count as free."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in GROUP_FILES:
                continue
            root = Path("/sys/fs/cgroup", controllers)
            for folder in (root / group[1:], *(root / group[1:]).parents):
                with suppress(OSError, ValueError, KeyError):  # no such group here, or no limit
                    limit, used = (int((folder / name).read_text()) for name in GROUP_FILES[controllers])
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield limit - used + int(stat["inactive_file"])


def find_trouble(error: BaseException) -> MachineError | OSError | None:
    """The error as the machine's, with a message that needs no traceback; None if it may be the data's.

    Decoders report damage with OSErrors too, but without a number; the system's have one.
    """
    if isinstance(error, MachineError):
        return error
    is_short = isinstance(error, MemoryError) or any(text in str(error) for text in SHORTAGES)
    if is_short or getattr(error, "errno", None) == errno.ENOMEM:
        return OutOfMemoryError(str(error) or "an allocation failed")
    return error if isinstance(error, OSError) and error.errno is not None else None


def is_misplaced(error: BaseException) -> bool:
    """True if there is no such file, or one is where a directory should be, or the reverse: no trouble of the machine.

    `find_trouble` cannot know that, since a folder of the corpus that is not mounted gives the same errors.
    """
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)


def rule_out(error: Exception, again: Callable[[], object], *, needed: int = SPARE_BYTES) -> None:
    """Rules out that the machine is to blame for `error`: returns if `again`, alone, fails too and memory is free.

    Args:
        again: does once more what failed.
        needed: bytes that must be free for the second failure to count.

    Raises:
        MachineError, OSError: the machine is to blame.
    """
    trouble = find_trouble(error)
    if isinstance(trouble, OSError):
        raise trouble
    with _alone:
        try:
            again()
        except Exception as second:  # of any library that reads data; the caller reports the first
            if isinstance(trouble := find_trouble(second), OSError):
                raise trouble from error
            check_memory(str(second) or type(second).__name__, needed=needed)
            return
    if isinstance(trouble, OutOfMemoryError):
        raise trouble
    raise MachineError(f"{error}; it did not fail a second time: memory was short, or a disk or network is failing")


def check_memory(problem: str, *, needed: int = SPARE_BYTES) -> None:
    """
    Raises:
        OutOfMemoryError: less than `needed` bytes are free, which explains `problem`.
    """
    if (free := free_memory()) < needed:
        raise OutOfMemoryError(f"{problem}; {free >> 20} MiB are free and {needed >> 20} may be needed")
