"""Finder `ocr`: the text in a picture, line by line, read by RapidOCR, whose package carries its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from pipeline.engines import Engine
from pipeline.records import Found
from pipeline.sections import key
from stages.finders import MAX_PIXELS, FinderInput, FinderResult, map_pictures, require_packages, scale_box


@dataclass(frozen=True, kw_only=True)
class Config:
    labels: ClassVar = ("text",)
    min_confidence: float = key(0.5, "lines with less confidence are not found", least=0, most=1)
    max_pixels: int = key(MAX_PIXELS, "width times height; larger pictures are reduced first", least=2**12)


def prepare(config: Config, *, run: Path | None, field: str) -> Config:
    """
    Raises:
        ConfigError: RapidOCR is not installed.
    """
    require_packages("rapidocr", "onnxruntime", field=field, kind="ocr")
    return config


def find(inputs: Iterable[FinderInput], settings: Config, engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
    read = partial(read_lines, lock=Lock(), min_confidence=settings.min_confidence)
    return map_pictures(inputs, read, package="rapidocr", max_pixels=settings.max_pixels)


def read_lines(picture: Any, *, lock: Lock, min_confidence: float) -> Iterator[Found]:
    """The lines of a picture; one picture at a time, since a reader has state."""
    import numpy as np

    width, height = picture.size
    margin = ((0, max(0, width // 100 - height)), (0, max(0, height // 100 - width)), (0, 0))  # it refuses thin strips
    pixels = np.pad(np.asarray(picture)[:, :, ::-1], margin, constant_values=255)
    with lock:
        read = load_reader()(pixels)
    lines = [] if read.boxes is None else zip(read.boxes.tolist(), read.txts, read.scores, strict=True)
    for corners, text, confidence in lines:
        if confidence >= min_confidence and text.strip():
            box = scale_box((*map(min, *corners), *map(max, *corners)), width, height)
            yield Found(label="text", text=text, confidence=round(float(confidence), 4), **box)


@cache
def load_reader() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})
