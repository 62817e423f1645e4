"""Finder `nudity`: faces and parts of bodies, bare or covered, by NudeNet, whose package carries its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.engines import Engine
from pipeline.records import Found
from pipeline.sections import key
from stages.finders import FinderInput, FinderResult, map_pictures, require_packages, scale_box
from stages.finders._parts import PARTS

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_PIXELS = 2**20  # the model sees 320 x 320


@dataclass(frozen=True, kw_only=True)
class Config:
    labels: ClassVar = PARTS
    min_confidence: float = key(0.2, "parts with less confidence are not found; NudeNet has none below 0.2", most=1)


def prepare(config: Config, *, run: Path | None, field: str) -> Config:
    """
    Raises:
        ConfigError: NudeNet is not installed.
    """
    require_packages("nudenet", field=field, kind="nudity")
    return config


def find(inputs: Iterable[FinderInput], settings: Config, engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
    detect = partial(detect_parts, min_confidence=settings.min_confidence)
    return map_pictures(inputs, detect, package="nudenet", max_pixels=MAX_PIXELS)


def detect_parts(picture: Picture, *, min_confidence: float) -> Iterator[Found]:
    import numpy as np

    for part in load_detector()(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])):
        x, y, width, height = part["box"]
        box = scale_box((x, y, x + width, y + height), *picture.size)
        if part["score"] >= min_confidence:
            yield Found(label=part["class"].lower(), confidence=round(float(part["score"]), 4), **box)


@cache
def load_detector() -> Callable[[Any], Any]:
    from nudenet import NudeDetector

    detect: Callable[[Any], Any] = NudeDetector().detect
    return detect
