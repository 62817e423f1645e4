"""Decides that an engine's processes end with the process that opened it, even when that one is killed outright.

A small process of our own waits at the end of a pipe. When the pipe breaks, it kills those that it was told of, with
the groups that they lead, and nobody else. What they do, it does not know.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

DISMISSED = b"dismissed"


class Guard:
    """Watches over child processes until `dismiss`."""

    def __init__(self, pids: Iterable[int]) -> None:
        command = [sys.executable, "-P", __file__, *(f"{pid}:{started(pid)}" for pid in pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def dismiss(self) -> None:
        """Idempotent."""
        with suppress(ValueError, BrokenPipeError):
            self._process.communicate(DISMISSED)


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks: with its number, who it is. "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def main() -> None:
    if sys.stdin.buffer.read() == DISMISSED:
        return
    for ward in sys.argv[1:]:
        pid, since = int(ward.partition(":")[0]), ward.partition(":")[2]
        if since and started(pid) == since:
            with suppress(ProcessLookupError):
                kill = os.killpg if os.getpgid(pid) == pid else os.kill
                kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
