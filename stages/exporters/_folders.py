"""Folders of files that are put in place as a whole, one per shard.

Where a folder holds a file per image, the footer of the shard's table names only the file that lists the others.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.storage.disk import make_folder, start_writing, sync_path, sync_tree
from pipeline.storage.layout import unfinished_path


class UnfinishedFolder:
    """A folder that is written outside its final place; it is created when it is first opened."""

    def __init__(self, path: Path, *, work: Path) -> None:
        self.path = path
        self._temporary = unfinished_path(path, work=work)
        self._folders: set[Path] = set()

    def open(self, name: str = "") -> Path:
        """Creates the folder, or one in it, and returns its present place."""
        folder = self._temporary / name
        if folder not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)
        return folder

    def write(self, name: str, data: bytes) -> None:
        """Writes a file; `name` may have folders in it, and must be new."""
        folder, _, file = name.rpartition("/")
        with open(self.open(folder) / file, "xb") as out:
            out.write(data)
            out.flush()
            start_writing(out.fileno())

    def commit(self) -> None:
        """Replaces an earlier folder by this one; if it was never opened, only removes the earlier one."""
        sync_tree(self._temporary)
        old = self._temporary.with_name(f"{self._temporary.name}.old")
        if self.path.exists():
            make_folder(old.parent)
            os.replace(self.path, old)
        if self._folders:
            make_folder(self.path.parent)
            os.replace(self._temporary, self.path)
            sync_path(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
