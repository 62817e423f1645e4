"""Verification of exported files: images are compared with the digests in their rows, texts with what lists them.

A form of export knows how its files are read; which files a run should have is known elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from tarfile import TarError
from types import ModuleType
from typing import TypeVar

from pipeline import machine, plugins
from pipeline.storage.layout import find_numbers
from pipeline.storage.payloads import LooseFile, measure_file

T = TypeVar("T")
STRAY = "belongs to no shard of plan.parquet"
# A file, its damage, and the file of the footer without which its shard is made again; "": it belongs to no shard.
Difference = tuple[str, str, str]


def load_form(folder: str, own: Sequence[str]) -> ModuleType | None:
    """The form of export that writes a folder below export/; None if there is none any more.

    Args:
        own: names of a run's forms, beside the built-in ones.
    """
    names = {name.rpartition(".")[2]: name for name in (*plugins.list_names("stages.exporters"), *own)}
    return plugins.load("stages.exporters", names[folder]) if folder in names else None


def compare_files(
    run: Path, own: Sequence[str], names: Iterable[str], digests: Mapping[str, str], damaged: Container[str]
) -> Iterator[Difference]:
    """Compares exported files with their rows, form by form, since a form may spread a shard over several files.

    Args:
        own: names of the run's forms.
        names: of the files, as a footer has them.
        digests: key -> SHA-256 of the image file.
        damaged: folders of forms with further files, whose images are unknown.
    """
    for folder, files in groupby(sorted(names), key=lambda name: Path(name).parts[1]):
        comparison, module = _Comparison(run, digests), load_form(folder, own)
        if module is None:
            continue
        for name in files:
            if hasattr(module, "list_loose_files"):
                yield from comparison.compare_loose_files(name, partial(module.list_loose_files, run / name))
            elif hasattr(module, "read_images"):
                yield from comparison.compare_images(name, partial(module.read_images, run / name))
        if folder not in damaged:
            yield from comparison.compare_keys()


@dataclass
class _Comparison:
    """The files of one form and shard."""

    run: Path
    digests: Mapping[str, str]

    def __post_init__(self) -> None:
        self._missing, self._is_complete = set(self.digests), True
        self._first = self._with_images = ""

    def compare_images(self, name: str, read: Callable[[], Iterable[tuple[str, bytes]]]) -> Iterator[Difference]:
        found, reason = _try(lambda: {key: hashlib.sha256(data).hexdigest() for key, data in read()})
        found = found or {}
        unlike = sorted(key for key in found if found[key] != self.digests.get(key))
        if unlike:
            reason = f"has {len(unlike)} images that are not those of their rows, {unlike[0]} the first"
        self._add(name, found)
        if reason:
            self._is_complete = False
            yield name, reason, name

    def compare_loose_files(self, name: str, list_files: Callable[[], Iterable[LooseFile]]) -> Iterator[Difference]:
        loose, reason = _try(lambda: [*list_files()])
        loose = loose or []
        self._add(name, {file.key for file in loose})
        if reason:
            self._is_complete = False
            yield name, reason, name
        for file in loose:
            is_own = file.path.is_relative_to(self.run)
            if not is_own and measure_file(file.path)[1]:
                continue  # a file of the corpus, which is compared with the row of ingest
            if reason := self._compare_loose_file(file):
                yield str(file.path.relative_to(self.run) if is_own else file.path), reason, name
        for path in _find_strays(self.run, name, (file.path for file in loose)):
            yield str(path.relative_to(self.run)), STRAY, ""

    def _compare_loose_file(self, file: LooseFile) -> str:
        num_bytes, problem = measure_file(file.path)
        expected = self.digests.get(file.key) if file.text is None else hashlib.sha256(file.text.encode()).hexdigest()
        if problem or expected == hashlib.sha256(file.path.read_bytes()).hexdigest():
            return problem
        if not num_bytes:
            return "is empty"
        return f"does not have the {'image' if file.text is None else 'caption'} of {file.key}"

    def compare_keys(self) -> Iterator[Difference]:
        """Compares the rows with those whose images were found, if every file was read."""
        if self._missing and self._first and self._is_complete:
            why = f"has no image of {len(self._missing)} rows, {min(self._missing)} the first"
            yield self._with_images or self._first, why, self._with_images or self._first

    def _add(self, name: str, keys: Iterable[str]) -> None:
        found = {*keys}
        self._missing -= found
        self._first = self._first or name
        self._with_images = self._with_images or (name if found else "")


def _try(read: Callable[[], T]) -> tuple[T | None, str]:
    """What is read, and ""; or None, and why the file cannot be read."""
    try:
        return read(), ""
    except (OSError, ValueError, LookupError, TypeError, TarError) as error:  # Arrow's errors are among them
        if not machine.is_misplaced(error):
            machine.rule_out(error, read)
        return None, f"cannot be read: {error}"


def _find_strays(run: Path, cause: str, listed: Iterable[Path]) -> Iterator[Path]:
    """The files in the numbered folders of loose files that their list does not name.

    Args:
        cause: the file that lists them, relative to the run.
        listed: the loose files.
    """
    known = {os.path.normpath(path) for path in (run / cause, *listed)}
    for folder in sorted({folder for path in known for folder in _find_numbered_folder(run, Path(path))}):
        for path, _, files in os.walk(folder):
            found = (os.path.join(path, file) for file in sorted(files) if not file.startswith("."))  # noqa: PTH118
            yield from (Path(file) for file in found if file not in known)


def _find_numbered_folder(run: Path, path: Path) -> Iterator[Path]:
    """The outermost numbered folder of a run that a file is in, if there is one."""
    if path.is_relative_to(run):
        folders = (folder for folder in reversed(path.parents) if folder != run and folder.is_relative_to(run))
        yield from islice((folder for folder in folders if find_numbers(folder.name)), 1)
