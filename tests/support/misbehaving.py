"""A probe that crashes, hangs or lists its environment on command, as hostile files make decoders do."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace

from pipeline.decoding import images


def probe(data: bytes, *, limits: images.Limits) -> images.Probe:
    if data.startswith(b"crash"):
        ctypes.string_at(0)
    if data.startswith(b"hang"):
        ctypes.PyDLL(None).sleep(3600)  # like a C library: no Python code runs meanwhile
    if data.startswith(b"leave"):
        os._exit(3)
    if data.startswith(b"raise"):
        raise ZeroDivisionError
    if data.startswith(b"tell"):
        return replace(images.probe(data), error="\n".join(os.environ))
    return images.probe(data, limits=limits)
