"""Trees that survive a power failure: file by file, or with one sync of their file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.storage import disk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a", "b/c", "b/d/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of files and folders that are synced one by one."""
    paths: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: paths.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    return paths


def test_a_small_tree_is_synced_file_by_file(tree: Path, synced: list[str]) -> None:
    disk.sync_tree(tree)
    assert sorted(synced) == sorted(str(tree / name) for name in ("", "a", "b", "b/c", "b/d", "b/d/e"))


def test_a_large_tree_is_synced_at_once(tree: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(disk, "MANY", 6)
    monkeypatch.setattr(disk, "_find_call", lambda name, *types: lambda handle: calls.append(name))
    disk.sync_tree(tree)
    assert (calls, synced) == (["syncfs"], [])


def test_without_the_call_a_large_tree_is_synced_file_by_file(
    tree: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "MANY", 6)
    monkeypatch.setattr(disk, "_find_call", lambda name, *types: None)
    disk.sync_tree(tree)
    assert len(synced) == 6


def test_a_disk_that_cannot_be_written_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MANY", 6)
    monkeypatch.setattr(disk, "_find_call", lambda name, *types: lambda handle: -1)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match=str(tree)) as error:
        disk.sync_tree(tree)
    assert error.value.errno == errno.EIO
