"""Pictures that a corpus must not contain, such as those of benchmarks: their SHA-256 and their perceptual hashes.

They are given as directories of images, or as text files with one of the two hashes at the beginning of each line. Both
have 64 hexadecimal digits, and no SHA-256 is near a perceptual hash, so each line counts as both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.decoding.probe_pool import ProbePool

LINE = re.compile(r"\s*([0-9a-fA-F]{64})\b|\s*(#|$)")


def describe_excluded(path: Path) -> str:
    """A digest of a file's content, or of the names and sizes of a directory's files.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a line of the file has no hash.
    """
    if path.is_dir():
        listing = [(str(file.relative_to(path)), file.stat().st_size) for file in list_files(path)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return hashlib.sha256("\n".join(_read_lines(path)).encode()).hexdigest()


def read_excluded(paths: Iterable[Path], *, num_procs: int) -> Iterator[tuple[str, str | None]]:
    """The SHA-256 and the perceptual hash of each picture; files that are not images have only the first."""
    with ProbePool(num_procs=num_procs, probe="pipeline.decoding.images:probe_and_measure") as pool:
        for path in paths:
            if path.is_dir():
                yield from ((p.sha256, p.phash) for p in pool.map(file.read_bytes() for file in list_files(path)))
            else:
                yield from ((digest, digest) for digest in _read_lines(path))


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_lines(path: Path) -> list[str]:
    hashes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = LINE.match(line)
        if not match:
            raise ValueError(f"{path}: line {number} is {line[:80]!r}; it must begin with 64 hexadecimal digits")
        if match[1]:
            hashes.append(match[1].lower())
    return hashes
