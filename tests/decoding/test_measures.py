"""Copies of a picture have near hashes, other pictures do not, and measuring changes nothing else of a probe."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from PIL import Image, ImageOps
from skimage import data

from pipeline.decoding.images import probe, probe_and_measure
from tests.support.runs import GOOD, picture

NEAR = 31  # bits of 256; see pipeline/decoding/measures.py


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def find_hash(data: bytes) -> int:
    found = probe_and_measure(data)
    assert found.status == "ok" and found.phash and len(found.phash) == 64
    return int(found.phash, 16)


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return Image.fromarray(data.chelsea())


def test_copies_are_near_and_other_pictures_far(cat: Image.Image) -> None:
    own = find_hash(encode(cat, "PNG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    copies = {
        "quality 50": encode(cat, "JPEG", quality=50),
        "WebP": encode(cat, "WEBP", quality=70),
        "half": encode(cat.resize((cat.width // 2, cat.height // 2)), "JPEG", quality=85),
        "palette": encode(cat.quantize(64), "PNG"),
        "transparent": encode(Image.merge("RGBA", (*cat.split(), Image.new("L", cat.size, 250))), "PNG"),
        "EXIF orientation": encode(cat.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=turned),
    }
    assert {name: copy for name, copy in copies.items() if (find_hash(copy) ^ own).bit_count() > NEAR} == {}
    others = [Image.fromarray(data.coffee()), Image.fromarray(data.astronaut()), ImageOps.mirror(cat)]
    assert all((find_hash(encode(other, "JPEG")) ^ own).bit_count() > 3 * NEAR for other in others)


def test_a_flat_picture_has_an_entropy_but_no_hash() -> None:
    flat = probe_and_measure(encode(Image.new("RGB", (50, 40), "red"), "PNG"))
    assert (flat.status, flat.phash, flat.entropy) == ("ok", None, 0.0)


@pytest.mark.parametrize("kind", [*GOOD, "cut", "empty"])
def test_measuring_changes_no_other_field(kind: str) -> None:
    name = {"jpg": "jpeg", "cut": "jpeg", "empty": "jpeg"}.get(kind, kind)
    file = {"empty": b""}.get(kind, picture(3, name, (400, 300))[: 500 if kind == "cut" else None])
    plain, measured = probe(file), probe_and_measure(file)
    assert dataclasses.replace(measured, phash=None, entropy=None) == plain
    assert (measured.entropy is None) == (plain.status != "ok")
