"""Finder `quality`: what is wrong with a picture as such, measured on its luminance; no model is used.

Each fault has a measure and a key with its limit. Its confidence falls from 1, at the measure 0, by half at the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from pipeline.engines import Engine
from pipeline.records import Found
from pipeline.sections import key
from stages.finders import FinderInput, FinderResult, encode_other, map_pictures


@dataclass(frozen=True, kw_only=True)
class Config:
    labels: ClassVar = ("blurred", "dark", "bright", "low_entropy", "blank", "placeholder")
    blurred: float = key(0.006, "limit of the variance of the luminance's Laplacian by that of the luminance", least=0)
    dark: float = key(0.2, "limit of the luminance of the brightest tenth, 0 to 1", least=0)
    bright: float = key(0.15, "limit of 1 less the luminance of the darkest tenth, 0 to 1", least=0)
    low_entropy: float = key(2.5, "limit of the entropy of the luminance, 0 to 8 bits", least=0)
    blank: float = key(3.0, "limit of the standard deviation of the luminance, of 255", least=0)
    placeholder: float = key(0.15, "limit of the share of pixels without the commonest of at most 32 colours", least=0)
    min_confidence: float = key(0.25, "faults with less confidence are not found", least=0, most=1)


def find(inputs: Iterable[FinderInput], settings: Config, engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
    return map_pictures(inputs, partial(find_faults, settings=settings), max_pixels=2**18)


def find_faults(picture: Any, *, settings: Config) -> Iterator[Found]:
    for fault, measure in measure_picture(picture).items():
        confidence = round(max(0.0, 1 - measure / max(1e-9, 2 * getattr(settings, fault))), 4)
        if confidence > 0 and confidence >= settings.min_confidence:
            yield Found(label=fault, confidence=confidence, other=encode_other({"measure": round(measure, 6)}))


def measure_picture(picture: Any) -> dict[str, float]:
    """The measure of each fault of an RGB picture; 0 is the worst."""
    import numpy as np

    luminance = picture.convert("L")
    pixels = np.pad(np.asarray(luminance, dtype=np.float32), 1, mode="edge")
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    low, high, variance = *(np.percentile(pixels, (10, 90)) / 255), float(pixels.var())
    colours = np.unique(np.asarray(picture, dtype=np.int32) // 8 @ [1024, 32, 1], return_counts=True)[1]
    return {
        "blurred": float(np.var(around - 4 * pixels[1:-1, 1:-1])) / variance if variance >= 1 else 1.0,
        "dark": float(high),
        "bright": float(1 - low),
        "low_entropy": abs(luminance.entropy()),
        "blank": variance**0.5,
        "placeholder": float(1 - colours.max() / colours.sum()) if len(colours) <= 32 else 1.0,
    }
