"""JSON Lines of one exchange per image, with the images in files beside: what `messages` and `llava` have in common.

`data/00000.jsonl` has the rows and `images/00000/` the image files, which the rows name relative to the form's folder.
A row names the corpus's own file instead when the training set references its images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.storage.payloads import UnfinishedFile, commit_files
from stages.exporters import ExportSample
from stages.exporters._folders import UnfinishedFolder

PLACEHOLDER = "<image>"  # stands for the picture in a text; loaders count it


class Conversations:
    """The rows and images of one shard.

    Args:
        folder: the form's, below `<run>/export`.
        build_row: the JSON object of a sample, from the user's turn and the path of the image.
    """

    def __init__(
        self,
        run: Path,
        shard: int,
        work: Path,
        *,
        folder: str,
        build_row: Callable[[ExportSample, str, str], dict[str, Any]],
    ) -> None:
        root = run / "export" / folder
        self._run, self._build_row, self._shard = run, build_row, f"{shard:05d}"
        self._lines = UnfinishedFile(root / "data" / f"{self._shard}.jsonl", work=work)
        self._images = UnfinishedFolder(root / "images" / self._shard, work=work)

    def add(self, sample: ExportSample, suffix: str) -> None:
        name = f"{sample.row.key}.{suffix}"
        if not sample.reference:
            self._images.write(name, sample.data)
        path = sample.reference or f"images/{self._shard}/{name}"
        row = self._build_row(sample, f"{PLACEHOLDER}\n{remove_placeholders(sample.instruction)}", path)
        self._lines.open().write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def commit(self) -> Mapping[str, int]:
        self._images.commit()
        return commit_files(self._run, self._lines)

    def abandon(self) -> None:
        self._lines.abandon()
        self._images.abandon()


def remove_placeholders(text: str) -> str:
    """The text without the words that loaders take for a picture, a film or a sound.

    >>> remove_placeholders("A sign that reads <image>.")
    'A sign that reads image.'
    """
    for name in ("image", "video", "audio"):
        text = text.replace(f"<{name}>", name)
    return text


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished file."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def find_image(path: Path, name: str) -> Path:
    """The image file that a row of `path` names; a relative name is in the form's folder."""
    return path.parent.parent / name
