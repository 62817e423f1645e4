"""Pictures that a corpus must not contain, such as those of benchmarks: their SHA-256 and their perceptual hashes.

They are given as directories of images, as single images, or as text files with one of the two hashes at the beginning
of each line. Both have 64 hexadecimal digits, and no SHA-256 is near a perceptual hash, so each line counts as both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.decoding.formats import detect_format
from pipeline.decoding.probe_pool import ProbePool
from pipeline.progress import format_quantity

NUM_EXAMPLES = 5  # of extensions, in a message
HEAD_BYTES = 64  # by which an image is known
LINE = re.compile(r"\s*([0-9a-fA-F]{64})\b|\s*(#|$)")


def describe_excluded(path: Path) -> str:
    """A digest of a file's content, or of the names and sizes of a directory's files.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a line of the file has no hash, or the directory has no images.
    """
    if path.is_dir():
        _require_images(path)
        listing = [(str(file.relative_to(path)), file.stat().st_size) for file in list_files(path)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    if _is_image(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256("\n".join(_read_lines(path)).encode()).hexdigest()


def read_excluded(paths: Iterable[Path], *, num_procs: int) -> Iterator[tuple[str, str | None]]:
    """The SHA-256 and the perceptual hash of each picture; files that are not images have only the first."""
    with ProbePool(num_procs=num_procs, probe="pipeline.decoding.images:probe_and_measure") as pool:
        for path in paths:
            files = list_files(path) if path.is_dir() else [path] if _is_image(path) else []
            if files:
                yield from ((p.sha256, p.phash) for p in pool.map(file.read_bytes() for file in files))
            else:
                yield from ((digest, digest) for digest in _read_lines(path))


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _require_images(folder: Path) -> None:
    files = list_files(folder)
    if not files:
        raise ValueError(f"{folder} has no files; write a folder of images, or a text file of their hashes")
    if not any(map(_is_image, files)):
        found = ", ".join(sorted({file.suffix for file in files})[:NUM_EXAMPLES])
        number = format_quantity(len(files), "file")
        raise ValueError(f"{folder} has {number} ({found}), none of them an image; unpack archives first")


def _is_image(file: Path) -> bool:
    with open(file, "rb") as stream:
        return detect_format(stream.read(HEAD_BYTES)) is not None


def _read_lines(path: Path) -> list[str]:
    hashes = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = LINE.match(line)
        if not match:
            raise ValueError(f"{path}: line {number} is {line[:80]!r}; it must begin with 64 hexadecimal digits")
        if match[1]:
            hashes.append(match[1].lower())
    return hashes
