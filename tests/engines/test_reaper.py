"""An engine's processes end with the process that opened it."""

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
if sys.argv[1] == "tag_children":
    with reaper.tag_children():
        child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $$ $!; wait"])
else:
    child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $$ $!; wait"], env={**os.environ, **reaper.environment})
if sys.argv[2] == "stopped":
    reaper.stop()
    reaper.stop()
sys.stdin.read()
"""
WAYS = pytest.mark.parametrize("way", ["tag_children", "environment"])


@WAYS
def test_children_and_grandchildren_end_when_the_parent_is_killed(way: str) -> None:
    parent, others = start_parent(way, "watching"), start_parent(way, "watching")
    pids, spared = read_pids(parent), read_pids(others)
    parent.kill()
    assert all(wait_for_end(pid) for pid in pids)
    assert all(read_state(pid) == "S" for pid in spared), "another reaper's children were killed"
    others.kill()
    assert all(wait_for_end(pid) for pid in spared)


@pytest.mark.slow
@WAYS
def test_processes_outlive_a_reaper_that_was_stopped(way: str) -> None:
    parent = start_parent(way, "stopped")
    pids = read_pids(parent)
    time.sleep(0.5)  # a reaper that was not stopped would see the pipe break
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    assert all(read_state(pid) == "S" for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_processes_started_after_the_block_are_not_tagged() -> None:
    reaper, before = Reaper(), dict(os.environ)
    with reaper.tag_children():
        assert {**before, **reaper.environment} == dict(os.environ)
    assert dict(os.environ) == before
    reaper.stop()


def start_parent(*how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PARENT, *how]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def read_pids(parent: subprocess.Popen[bytes]) -> list[int]:
    """The child and the grandchild."""
    assert parent.stdout is not None
    return [int(pid) for pid in parent.stdout.readline().split()]


def wait_for_end(pid: int) -> bool:
    for _ in range(1200):
        if read_state(pid) in ("", "Z"):  # gone, or a zombie
            return True
        time.sleep(0.05)
    return False


def read_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
