"""Upright copies: image files whose pixels need no EXIF orientation to be seen as displayed."""

from __future__ import annotations

import io
from dataclasses import dataclass

from pipeline.decoding.images import decode_upright

JPEG_QUALITY = 95  # of 100; chroma keeps its full resolution
PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


@dataclass(frozen=True, kw_only=True)
class UprightCopy:
    """A re-encoded image file."""

    data: bytes
    format: str  # Pillow's name in lower case
    encoding: str  # in words, with the quality


def copy_upright(data: bytes) -> UprightCopy:
    """Re-encodes an image file upright and without an orientation: a JPEG as JPEG, all others as PNG, without loss.

    Only the first frame is kept. The colour profile and the rest of the EXIF are carried over.

    Raises:
        UndecodableError: the file cannot be decoded.
    """
    picture, name = decode_upright(data)
    kept = {key: picture.info[key] for key in ("exif", "icc_profile") if picture.info.get(key)}
    file = io.BytesIO()
    if name == "JPEG":
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, **kept)
        return UprightCopy(data=file.getvalue(), format="jpeg", encoding=f"jpeg, quality {JPEG_QUALITY}")
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.save(file, "PNG", **kept)
    return UprightCopy(data=file.getvalue(), format="png", encoding="png")
