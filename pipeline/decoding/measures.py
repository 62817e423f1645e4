"""Numbers that a picture's luminance gives: a perceptual hash, which copies of a picture share, and an entropy.

The hash is built like PDQ ("The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", Facebook, 2019):
64 x 64 luminance, the 16 x 16 lowest frequencies of its cosine transform without the constant ones, and a bit for each
that exceeds their median. PDQ counts pictures as alike when at most 31 of the 256 bits differ.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image as Picture

    Floats = npt.NDArray[np.float32]

VERSION = 1  # raised when equal pictures get other numbers
SIDE = 64  # pixels of the luminance that is measured
NUM_FREQUENCIES = 16  # in each direction
MIN_CONTRAST = 2.0  # standard deviation of the luminance, of 255: the bits of flatter pictures are noise


def measure_luminance(luminance: Picture) -> tuple[str | None, float]:
    """The perceptual hash, 64 hex digits, and the entropy, 0 to 8 bits a pixel; a flat picture has no hash.

    Args:
        luminance: `SIDE` x `SIDE` pixels, mode L, upright.
    """
    import numpy as np

    pixels = np.asarray(luminance, dtype=np.float32)
    entropy = max(0.0, round(luminance.entropy(), 4))
    if pixels.std() < MIN_CONTRAST:
        return None, entropy
    transform = _cosine_transform()
    frequencies = transform @ pixels @ transform.T
    return np.packbits(frequencies > np.median(frequencies)).tobytes().hex(), entropy


@cache
def _cosine_transform() -> Floats:
    """The rows 1 to 16 of the orthonormal type-II cosine transform of 64 values."""
    import numpy as np

    row, column = np.arange(1, NUM_FREQUENCIES + 1)[:, None], np.arange(SIDE)[None, :]
    values = math.sqrt(2 / SIDE) * np.cos(math.pi / (2 * SIDE) * row * (2 * column + 1))
    return values.astype(np.float32)
