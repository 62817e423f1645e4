"""Decides that an engine's processes end with the process that opened it, even when that one is killed outright.

They bear a mark in their environment, which their children inherit, so that none is missed, however young it is. A
small process of our own waits at the end of a pipe; when the pipe breaks, it kills all that bear the mark, and nobody
else. What they do, it does not know.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "RECAP_GUARD"
DISMISSED = b"dismissed"
PAUSE = 0.2  # seconds between two looks: who was being born at the first is there at the second


class Reaper:
    """Watches, until `dismiss`, over processes that are started with `environment`."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        # vLLM's processes name themselves, which would otherwise be written over what /proc shows of their environment.
        self.environment = {NAME: mark, "SPT_NOENV": "1"}
        command = [sys.executable, "-P", __file__, mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @contextmanager
    def tag_children(self) -> Iterator[None]:
        """What this process starts meanwhile is watched over."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def stop(self) -> None:
        """Idempotent."""
        with suppress(ValueError, BrokenPipeError):
            self._process.communicate(DISMISSED)


def find_tagged(mark: str) -> Iterator[int]:
    """The processes that were started with this mark."""
    line = f"{NAME}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def main() -> None:
    if sys.stdin.buffer.read() == DISMISSED:
        return
    while found := list(find_tagged(sys.argv[1])):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
