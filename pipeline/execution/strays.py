"""Files of a run that belong to no shard: views and loaders would read them with those that do.

It lists folders, and knows from the plan and the footers what belongs there. Hidden files, which readers skip and file
systems and desktops leave behind, are no strays; hidden tables are, since DuckDB reads them. Of a shard without a whole
table, the files beside it are unknown: they may be in place already, and are no strays either.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import plugins
from pipeline.execution.exported_files import load_form
from pipeline.execution.passes import Pass
from pipeline.records import Placed
from pipeline.sections import Run
from pipeline.storage.layout import PACKED, find_numbers
from pipeline.storage.payloads import SUMS
from pipeline.storage.tables import TableFooter

SUFFIX = ".parquet"
EXPORT = "export"


def find_stray_tables(run: Path, folders: Collection[str], *, num_shards: int) -> Iterator[Path]:
    """The entries of folders of tables, and of those of their statistics, that are no table of a planned shard.

    Args:
        folders: of all tables, relative to the run.
    """
    every = {*folders, *(f"stats/{folder}" for folder in folders)}
    above = {str(parent) for folder in every for parent in Path(folder).parents}
    for folder in sorted(every):
        for entry in _scan(run / folder):
            name = f"{folder}/{entry.name}"
            if _is_table(entry.name, num_shards) or name in above | every or name == f"{EXPORT}/index/{SUMS}":
                continue
            yield Path(entry.path)
    for folder in sorted(name for name in above - every if name.split("/")[0] == "stats"):  # the view reads all of it
        yield from (Path(entry.path) for entry in _scan(run / folder) if not entry.is_dir())


def _is_table(name: str, num_shards: int) -> bool:
    number = name.removesuffix(SUFFIX)
    return number.isdecimal() and int(number) < num_shards and name == f"{int(number):05d}{SUFFIX}"


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, if there is one, by name and without hidden files that are no tables."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") or entry.name.endswith(SUFFIX)]
        yield from sorted(found, key=lambda entry: entry.name)


def find_stray_payload(run: Run, p: Pass, footers: Collection[TableFooter | None]) -> Iterator[Path]:
    """The files beside a pass's tables that no footer and no list names: packed images, or exported files.

    Args:
        footers: of all shards in order; None: there is no whole table.
    """
    named = {name for footer in footers if footer for name in footer.payload}
    folders = {"/".join(Path(name).parts[: 2 if name.startswith(f"{EXPORT}/") else 1]) for name in named}
    if p.folder.startswith(f"{EXPORT}/"):
        formats = run.sections["export"][""].formats
        folders |= {f"{EXPORT}/{name.rpartition('.')[2]}" for name in formats}
    else:
        formats = ()
    missing = frozenset(number for number, footer in enumerate(footers) if footer is None)
    for folder in sorted(folders):
        own = frozenset(name for name in (named | {*p.whole_files}) if name.startswith(f"{folder}/"))
        listing = _Listing(run=run.folder, names=own, missing=missing, is_divided=issubclass(p.record, Placed))
        if folder != PACKED:
            name = folder.rpartition("/")[2]
            module = load_form(name, formats)
            listing.has_loose_files = hasattr(module, "list_loose_files")
            listing.is_divided |= not getattr(module, "DIVIDES", True)
            if name not in plugins.list_names("stages.exporters") and not listing.has_loose_files:
                continue  # a form of the user's own, of which nothing tells what else it writes
        yield from listing.find_strays(run.folder / folder)


@dataclass(kw_only=True)
class _Listing:
    """The files of one form, or the packed images."""

    run: Path
    names: frozenset[str]  # of files that belong to it, relative to the run
    missing: frozenset[int]  # shards without a whole table
    is_divided: bool  # whether the numbers of files are others than those of shards
    has_loose_files: bool = False  # in numbered folders, which are compared with their list, shard by shard

    @cached_property
    def _above(self) -> set[str]:
        return {str(parent) for name in self.names for parent in Path(name).parents}

    @cached_property
    def _numbers(self) -> set[str]:
        return {number for name in self.names for number in find_numbers(name)}

    def find_strays(self, folder: Path) -> Iterator[Path]:
        for entry in _scan(folder):
            path = Path(entry.path)
            name = str(path.relative_to(self.run))
            is_listed = self.has_loose_files and entry.name in self._numbers  # a folder, or whatever has its place
            if is_listed or name in self.names or self._may_belong(name):
                continue
            if not entry.is_dir():
                yield path
            elif self.missing or name in self._above or self._has_loose_folders(path):
                yield from self.find_strays(path)
            elif any(files for _, _, files in os.walk(path)):
                yield path

    def _has_loose_folders(self, folder: Path) -> bool:
        return self.has_loose_files and any(not self._numbers.isdisjoint(names) for _, names, _ in os.walk(folder))

    def _may_belong(self, name: str) -> bool:
        """True for a file of a shard whose table is not whole."""
        numbers = find_numbers(name)
        return bool(self.missing) and (self.is_divided or any(int(number) in self.missing for number in numbers))
