"""The examples of a recipe: pictures with the texts that a good answer would be, shown before the image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.decoding import images
from pipeline.validation import Section

MAX_EXAMPLES = 16
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class RecipeExample:
    """A picture and its text."""

    image: bytes
    text: str

    @property
    def stamp(self) -> list[str]:
        return [hashlib.sha256(self.image).hexdigest(), self.text]


def read_examples(section: Section, *, run: Path | None) -> tuple[RecipeExample, ...]:
    """The pictures of the folder that `examples` names, each with the text beside it (NAME.txt), in order of name.

    Args:
        section: of the recipe's file.
        run: the folder that a relative path begins at; None: the working directory.

    Raises:
        ConfigError: there is no such folder, or a picture or text is missing or cannot be read.
    """
    name = section.values.get("examples")
    if not name:
        return ()
    folder = (run or Path()) / str(name)
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        problem = "has no picture" if folder.is_dir() else "is no folder"
        advice = "it must have pictures, each with its text in NAME.txt beside it"
        raise section.error("examples", f"{str(folder)!r} {problem}; {advice}")
    if len(files) > MAX_EXAMPLES:
        raise section.error("examples", f"{str(folder)!r} has {len(files)} pictures; at most {MAX_EXAMPLES} are shown")
    return tuple(_read_all(section, files))


def _read_all(section: Section, files: list[Path]) -> Iterator[RecipeExample]:
    for file in files:
        try:
            image, text = file.read_bytes(), file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise section.error("examples", f"{file} or its text cannot be read: {error}") from error
        if problem := images.probe(image, limits=images.Limits(min_side=1)).error:
            raise section.error("examples", f"{file}: {problem}")
        if not text:
            raise section.error("examples", f"{file.with_suffix('.txt')} is empty; write what the answer to {file} is")
        yield RecipeExample(image=image, text=text)
