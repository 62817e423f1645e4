"""No process of an engine outlives the one that opened it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engines import _orphans
from pipeline.engines._orphans import Guard, started

PARENT = """
import subprocess, sys
import pytest

from pipeline.engines import _orphans
from pipeline.engines._orphans import Guard
child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $$ $!; wait"], start_new_session=sys.argv[1] == "leads")
Guard([child.pid])
sys.stdin.read()
"""


@pytest.mark.parametrize("leads", ["leads", "follows"])
def test_a_child_ends_when_its_parent_is_killed_and_the_group_that_it_leads(leads: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, leads], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child, grandchild = map(int, parent.stdout.readline().split())
    time.sleep(0.5)  # until the guard stands
    parent.kill()
    parent.wait()
    assert ends(child)
    if leads == "leads":
        assert ends(grandchild)
    else:
        assert started(grandchild)
        os.kill(grandchild, signal.SIGKILL)
    parent.communicate()


def test_a_guard_that_is_dismissed_lets_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    guard = Guard([child.pid])
    guard.dismiss()
    guard.dismiss()
    assert child.poll() is None
    child.kill()
    child.wait()


def test_another_process_that_has_got_the_number_is_left_alone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    subprocess.run([sys.executable, _orphans.__file__, f"{child.pid}:1"], stdin=subprocess.DEVNULL, check=True)
    assert child.poll() is None
    subprocess.run([sys.executable, _orphans.__file__, f"{child.pid}:{started(child.pid)}"], input=b"", check=True)
    assert child.wait() == -signal.SIGKILL


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
