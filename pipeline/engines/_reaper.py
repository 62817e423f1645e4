"""The reaper: ends an engine's processes with the process that opened it, even when that one is killed outright.

The processes carry a tag in their environment, which their children inherit, so that none is missed. A small process
waits at the end of a pipe; when the pipe breaks, it kills every process with the tag and no other. It knows nothing of
what they do.
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

NAME = "RECAP_REAPER"
STOP = b"stop"
PAUSE = 0.2  # seconds between two scans: a process that was being forked during the first shows up in the second


class Reaper:
    """Watches processes that are started with `environment`, until `stop` is called."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex
        # vLLM's processes set their titles, which would otherwise overwrite what /proc shows of their environment.
        self.environment = {NAME: tag, "SPT_NOENV": "1"}
        command = [sys.executable, "-P", __file__, tag]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @contextmanager
    def tag_children(self) -> Iterator[None]:
        """Tags every process that this one starts inside the block."""
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
        """Stops watching; tagged processes live on. Idempotent."""
        with suppress(ValueError, BrokenPipeError):
            self._process.communicate(STOP)


def find_tagged(tag: str) -> Iterator[int]:
    """Yields the ids of running processes that carry the tag."""
    line = f"{NAME}={tag}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def main() -> None:
    if sys.stdin.buffer.read() == STOP:
        return
    while pids := list(find_tagged(sys.argv[1])):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
