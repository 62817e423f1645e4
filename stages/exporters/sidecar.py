"""Export form `sidecar`: `export/sidecar/00000/` with KEY.jpg and its caption, on one line, in KEY.txt.

kohya's scripts read the first line of a caption file and SimpleTuner takes each line as a caption of its own. The
`metadata.jsonl` of a folder lists its images: kohya's scripts read it instead of the caption files, and `datasets`
as an image folder. When the training set references its images, the folder has the caption files alone, named as the
corpus names the images, so that they can be copied beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.storage.payloads import LooseFile, UnfinishedFile, commit_files
from stages.exporters import CardEntry, ExportSample
from stages.exporters._folders import UnfinishedFolder

CARD = CardEntry(image="image", caption="caption", files="sidecar/*/metadata.jsonl")
REFERENCES_IMAGES = True
TURNED = range(5, 9)  # EXIF orientations that exchange width and height
MAX_NAME = 240  # bytes of one part of a path


def open(run: Path, shard: int, work: Path, split: str = "") -> Sidecars:
    return Sidecars(run, run / "export" / "sidecar" / split / f"{shard:05d}", work)


def list_loose_files(path: Path) -> Iterator[LooseFile]:
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield LooseFile(path=path.parent / row["caption_file"], key=row["key"], text=f"{row['caption']}\n")
            yield LooseFile(path=path.parent / row["image_path"], key=row["key"])


class Sidecars:
    """The caption files of one shard, with or without the images, and a list of them."""

    def __init__(self, run: Path, path: Path, work: Path) -> None:
        self._run, self._folder = run, UnfinishedFolder(path, work=work)
        self._list = UnfinishedFile(path / "metadata.jsonl", work=work)
        self._files: set[str] = set()  # names of caption files
        self._folders: set[str] = set()  # that hold them

    def add(self, sample: ExportSample, suffix: str) -> None:
        name = f"{sample.row.key}.{suffix}"
        text_name = f"{sample.row.key}.txt"
        if sample.reference:
            text_name = self._name_text(sample)
        else:
            self._folder.write(name, sample.data)
        self._folder.write(text_name, f"{sample.line}\n".encode())
        row = {
            **({} if sample.reference else {"file_name": name}),
            "image_path": sample.reference or name,
            "caption_file": text_name,
            "caption": sample.line,
            "image_size": find_stored_size(sample),
            "key": sample.row.key,
            "source_key": sample.row.source_key,
            "sha256": sample.row.sha256,
        }
        self._list.open().write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def commit(self) -> Mapping[str, int]:
        self._folder.commit()
        return commit_files(self._run, self._list)

    def abandon(self) -> None:
        self._list.abandon()
        self._folder.abandon()

    def _name_text(self, sample: ExportSample) -> str:
        """The corpus's name of the image with the extension .txt; its key where that is no safe or no new name."""
        path = PurePosixPath(sample.row.source_key)
        names = (str(path.with_suffix(".txt")) if path.name else "", f"{path}.txt", f"{sample.row.key}.txt")
        name = next(name for name in names if is_safe_name(name) and self._is_free(name))
        self._files.add(name)
        self._folders.update(map(str, PurePosixPath(name).parents))
        return name

    def _is_free(self, name: str) -> bool:
        return name not in self._files | self._folders and self._files.isdisjoint(map(str, PurePosixPath(name).parents))


def is_safe_name(name: str) -> bool:
    """True if a relative path is one on every file system, and leads nowhere else."""
    parts = name.split("/")
    return name.isprintable() and not any(
        part in ("", ".", "..") or len(part.encode()) > MAX_NAME or set(part) & set('\\:*?"<>|') for part in parts
    )


def find_stored_size(sample: ExportSample) -> list[Any]:
    """Width and height as the file has them: kohya's scripts do not turn pictures."""
    size = [sample.row.width, sample.row.height]
    return size[::-1] if sample.row.orientation in TURNED else size
