"""Upright copies of image files, at their own size or a smaller one, which need no EXIF orientation."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.decoding.images import decode_upright

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

JPEG_QUALITY = 95  # of 100, unless another is asked for; chroma keeps its full resolution
PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


@dataclass(frozen=True, kw_only=True)
class UprightCopy:
    """A re-encoded image file."""

    data: bytes
    format: str  # Pillow's name in lower case
    encoding: str  # in words, with the quality
    width: int  # pixels
    height: int


def copy_upright(data: bytes, *, size: tuple[int, int] | None = None, quality: int = JPEG_QUALITY) -> UprightCopy:
    """Re-encodes an image file upright and without an orientation: a JPEG as JPEG, all others as PNG, without loss.

    Only the first frame is kept. The colour profile and the rest of the EXIF are carried over.

    Args:
        size: width and height of the copy, pixels; None: the picture's own.
        quality: of JPEG, of 100.

    Raises:
        UndecodableError: the file cannot be decoded.
    """
    picture, name = decode_upright(data)
    kept = {key: picture.info[key] for key in ("exif", "icc_profile") if picture.info.get(key)}
    if size is not None:
        picture = _scale(picture, size)
    file, (width, height) = io.BytesIO(), picture.size
    if name == "JPEG":
        picture.save(file, "JPEG", quality=quality, subsampling=0, **kept)
        kind, words = "jpeg", f"jpeg, quality {quality}"
    else:
        if picture.mode not in PNG_MODES:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        picture.save(file, "PNG", **kept)
        kind = words = "png"
    if size is not None:
        words += f", {width} x {height}"
    return UprightCopy(data=file.getvalue(), format=kind, encoding=words, width=width, height=height)


def _scale(picture: Picture, size: tuple[int, int]) -> Picture:
    """The picture at another size, by Lanczos; palettes and bitmaps, which have no colours between theirs, as RGB."""
    from PIL.Image import Resampling

    if picture.mode in ("1", "P", "PA"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture.resize(size, Resampling.LANCZOS)
