"""No process of an engine outlives the one that opened it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.engines._orphans import Guard, started

PARENT = """
import subprocess, sys
from pipeline.engines._orphans import Guard
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Guard([child.pid])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert started(child)
    parent.kill()
    parent.communicate()
    assert ends(child)


def test_a_guard_that_is_dismissed_lets_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    guard = Guard([child.pid])
    guard.dismiss()
    guard.dismiss()
    assert child.poll() is None
    child.kill()
    child.wait()


def test_another_process_under_the_same_number_is_left_alone() -> None:
    assert started(os.getpid()) != started(os.getppid()) and not started(2**22 + 1)


def ends(pid: int) -> bool:
    for _ in range(200):
        if state(pid) in ("", "Z"):  # gone, or dead and not yet buried
            return True
        time.sleep(0.05)
    return False


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
