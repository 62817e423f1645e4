"""No process of an engine outlives the one that opened it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engines._reaper import Reaper

ROOT = Path(__file__).parent.parent.parent

PARENT = """
import os, subprocess, sys
from pipeline.engines._reaper import Reaper
reaper = Reaper()
if sys.argv[1] == "marking":
    with reaper.tag_children():
        child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $$ $!; wait"])
else:
    child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $$ $!; wait"], env={**os.environ, **reaper.environment})
if sys.argv[2] == "dismissed":
    reaper.stop()
    reaper.stop()
sys.stdin.read()
"""
WAYS = pytest.mark.parametrize("way", ["marking", "environment"])


@WAYS
def test_a_child_ends_when_its_parent_is_killed_and_so_do_its_own_children(way: str) -> None:
    parent, others = started(way, "standing"), started(way, "standing")
    pids, spared = told(parent), told(others)
    parent.kill()
    assert all(ends(pid) for pid in pids)
    assert all(state(pid) == "S" for pid in spared), "another guard's children were killed"
    others.kill()
    assert all(ends(pid) for pid in spared)


@WAYS
def test_a_reaper_that_is_dismissed_lets_live(way: str) -> None:
    parent = started(way, "dismissed")
    pids = told(parent)
    time.sleep(0.5)  # a guard that does not know would see the pipe break
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    assert all(state(pid) == "S" for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_what_is_started_later_is_not_marked() -> None:
    reaper, before = Reaper(), dict(os.environ)
    with reaper.tag_children():
        assert {**before, **reaper.environment} == dict(os.environ)
    assert dict(os.environ) == before
    reaper.stop()


def started(*how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PARENT, *how]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def told(parent: subprocess.Popen[bytes]) -> list[int]:
    """The child and the grandchild."""
    assert parent.stdout is not None
    return [int(pid) for pid in parent.stdout.readline().split()]


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
