"""A probe that crashes, hangs, lacks memory or lists its environment on command, as hostile files make decoders do."""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import replace

from pipeline.decoding import images


def probe(data: bytes, *, limits: images.Limits) -> images.Probe:
    if data.startswith(b"crash"):
        ctypes.string_at(0)
    if data.startswith(b"hang"):
        ctypes.PyDLL(None).sleep(3600)  # like a C library: no Python code runs meanwhile
    if data.startswith(b"killed"):  # as often as a file has bytes, or exhausted
        name = data.split()[1].decode()
        if size := os.path.getsize(name):  # noqa: PTH202
            os.truncate(name, size - 1)
            os.kill(os.getpid(), signal.SIGKILL)
        return images.probe(data.split(maxsplit=2)[2], limits=limits)
    if data.startswith(b"short"):
        raise MemoryError
    if data.startswith(b"leave"):
        os._exit(3)
    if data.startswith(b"raise"):
        raise ZeroDivisionError
    if data.startswith(b"tell"):
        return replace(images.probe(data), error="\n".join(os.environ))
    return images.probe(data, limits=limits)
