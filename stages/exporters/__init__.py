"""Export forms: the layouts in which a training set is written.

The folder is the registry: one form per file, named in `export.formats`. A form is a module with one function,
`open(run, shard, work) -> Writer`, which creates nothing on disk until the first sample arrives.

A form knows nothing of how samples are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline import plugins
from pipeline.records import Exported
from pipeline.storage.layout import work_folder
from pipeline.storage.payloads import file_extension


@dataclass(frozen=True, kw_only=True)
class ExportSample:
    """A sample of the training set with the bytes of its image file."""

    row: Exported
    data: bytes

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id


class FormWriter(Protocol):
    """Writes the samples of one shard in one form."""

    def add(self, example: ExportSample, suffix: str) -> None:
        """Appends a sample; `suffix` is the extension of its image's file name."""

    def commit(self) -> Mapping[str, int]:
        """Renames the finished files into place; returns path within the run -> bytes."""

    def abandon(self) -> None:
        """Removes unfinished files."""


class ExportPayload:
    """The payload of an export shard: its samples in each of the forms named in `export.formats`."""

    def __init__(self, run: Path, shard: int, *, formats: Sequence[str], image_extension: str) -> None:
        work = work_folder(run, "export/index", shard)
        self._extension = image_extension
        self._writers: list[FormWriter] = [
            plugins.load("stages.exporters", name).open(run, shard, work) for name in formats
        ]

    def take(self, output: ExportSample) -> Exported:
        suffix = file_extension(output.row.format) if self._extension == "original" else self._extension
        for writer in self._writers:
            writer.add(output, suffix)
        return output.row

    def commit(self) -> Mapping[str, int]:
        return {name: size for writer in self._writers for name, size in writer.commit().items()}

    def abandon(self) -> None:
        for writer in self._writers:
            writer.abandon()
