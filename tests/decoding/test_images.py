"""Probing and decoding of images."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.decoding import formats
from pipeline.decoding.images import (
    Limits,
    PixelRule,
    Region,
    can_send_unchanged,
    decode_pixels,
    encode_lossless,
    probe,
)
from pipeline.decoding.upright import copy_upright
from pipeline.errors import UndecodableError


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def corners(width: int = 112, height: int = 84) -> Image.Image:
    """Red, green, blue and yellow quarters, clockwise from the upper left, so that every turn is visible."""
    picture = Image.new("RGB", (width, height))
    for colour, left, top in ((255, 0, 0), 0, 0), ((0, 255, 0), 1, 0), ((0, 0, 255), 1, 1), ((255, 255, 0), 0, 1):
        x, y = left * width // 2, top * height // 2
        picture.paste(colour, (x, y, x + width // 2, y + height // 2))
    return picture


def is_near(picture: Image.Image, other: Image.Image, most: float = 6.0) -> bool:
    """Tests whether two images of one size differ by at most `most` levels on average."""
    assert picture.size == other.size and picture.mode == other.mode == "RGB"
    return float(np.abs(np.asarray(picture, float) - np.asarray(other, float)).mean()) <= most


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI"])
def test_every_format_is_read(format: str) -> None:
    data = encoded(corners(), format)
    found = probe(data)
    assert (found.status, found.error, found.format) == ("ok", None, format.lower())
    assert (found.width, found.height, found.orientation, found.num_frames) == (112, 84, 1, 1)
    assert is_near(decode_pixels(data, PixelRule(max_pixels=10**6)), corners())


def test_an_icon_is_read_at_its_largest() -> None:
    found = probe(encoded(corners(128, 128), "ICO"))
    assert (found.status, found.format, found.width, found.height) == ("ok", "ico", 128, 128)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(format: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a reader of `orientation` undoes
    stored = corners().transpose(Image.Transpose(undo[orientation])) if orientation > 1 else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    found = probe(data)
    assert (found.width, found.height, found.orientation) == (112, 84, orientation)
    assert is_near(decode_pixels(data, PixelRule(max_pixels=10**6)), corners())
    copy = copy_upright(data)
    found = probe(copy.data)
    assert (found.width, found.height, found.orientation, found.format) == (112, 84, 1, copy.format)
    assert is_near(Image.open(io.BytesIO(copy.data)).convert("RGB"), corners())
    small = decode_pixels(data, PixelRule(max_pixels=56 * 56))
    assert small.size == PixelRule(max_pixels=56 * 56).target_size(112, 84) and is_near(
        small, corners().resize(small.size), 12
    )


def grey16() -> Image.Image:
    return Image.fromarray(np.full((56, 56), 0x8000, np.uint16))


def floats() -> Image.Image:
    return Image.fromarray(np.repeat([[0.0, 1.0]], 56, 0).repeat(28, 1).astype("f4"))


def half_transparent(mode: str) -> Image.Image:
    picture = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 28, 56))
    return picture.convert(mode) if mode != "P" else picture.quantize(8)


def keyed() -> bytes:
    return encoded(Image.new("RGB", (56, 56), (9, 9, 9)), "PNG", transparency=(9, 9, 9))


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        pytest.param(encoded(Image.new("CMYK", (56, 56), (0, 255, 255, 0)), "JPEG"), RED, RED, id="cmyk-jpeg"),
        pytest.param(encoded(Image.new("CMYK", (56, 56), (0, 255, 255, 0)), "TIFF"), RED, RED, id="cmyk-tiff"),
        pytest.param(encoded(grey16(), "PNG"), (128,) * 3, (128,) * 3, id="grey16-png"),
        pytest.param(encoded(grey16(), "TIFF"), (128,) * 3, (128,) * 3, id="grey16-tiff"),
        pytest.param(encoded(floats(), "TIFF"), BLACK, WHITE, id="float-tiff"),
        pytest.param(encoded(half_transparent("RGBA"), "PNG"), RED, WHITE, id="rgba-png"),
        pytest.param(encoded(half_transparent("RGBA"), "WEBP", lossless=True), RED, WHITE, id="rgba-webp"),
        pytest.param(encoded(half_transparent("P"), "PNG"), RED, WHITE, id="palette-alpha-png"),
        pytest.param(encoded(half_transparent("RGBA"), "GIF"), RED, WHITE, id="gif-alpha"),
        pytest.param(encoded(half_transparent("LA"), "PNG"), (76,) * 3, WHITE, id="grey-alpha"),
        pytest.param(keyed(), WHITE, WHITE, id="colour-key"),
        pytest.param(encoded(Image.new("1", (56, 56), 1), "PNG"), WHITE, WHITE, id="one-bit"),
        pytest.param(encoded(Image.new("L", (56, 56), 77), "PNG"), (77,) * 3, (77,) * 3, id="grey"),
    ],
)
def test_every_mode_becomes_rgb_on_white(data: bytes, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    picture = decode_pixels(data, PixelRule(max_pixels=10**6))
    assert probe(data).status == "ok" and picture.mode == "RGB"
    seen = [picture.getpixel((4, 28)), picture.getpixel((51, 28))]
    assert np.abs(np.array(seen) - np.array([left, right])).max() <= 2


@pytest.mark.slow
def test_target_size_agrees_with_the_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = np.random.default_rng(7)
    sizes = rng.integers(28, 5000, (3000, 2)).tolist()
    for width, height in sizes:
        for factor, most in ((28, 256 * 28 * 28), (32, 64 * 32 * 32), (28, 1280 * 28 * 28)):
            size = PixelRule(max_pixels=most, factor=factor).target_size(width, height)
            once = smart_resize(height, width, factor, 56 * 56, most)[::-1]
            assert smart_resize(*size[::-1], factor, 56 * 56, most)[::-1] == size
            assert size == once or once[0] * once[1] > most


@given(st.integers(1, 30000), st.integers(1, 30000), st.integers(10, 4000), st.sampled_from([28, 32]))
def test_a_target_size_is_its_own_target(width: int, height: int, tokens: int, factor: int) -> None:
    most = tokens * factor * factor
    try:
        size = PixelRule(max_pixels=most, factor=factor).target_size(width, height)
    except UndecodableError:
        return
    assert size == PixelRule(max_pixels=most, factor=factor).target_size(*size)
    assert size[0] % factor == size[1] % factor == 0 and 56 * 56 <= size[0] * size[1] <= most


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_region_is_that_part_of_the_upright_picture(format: str, orientation: int) -> None:
    undo = {3: 3, 6: 2, 8: 4}
    picture = corners(224, 168)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else picture
    data = encoded(stored, format, exif=exif)
    quarters = {  # left, top, right, bottom
        (0.0, 0.0, 0.5, 0.5): (255, 0, 0),
        (0.5, 0.0, 1.0, 0.5): (0, 255, 0),
        (0.5, 0.5, 1.0, 1.0): (0, 0, 255),
        (0.0, 0.5, 0.5, 1.0): (255, 255, 0),
    }
    for box, colour in quarters.items():
        shown = decode_pixels(Region(data=data, box=box), PixelRule(max_pixels=10**6))
        assert shown.size == (112, 84) and is_near(shown, Image.new("RGB", (112, 84), colour))
        small = decode_pixels(Region(data=data, box=box), PixelRule(max_pixels=56 * 56))
        assert small.size == PixelRule(max_pixels=56 * 56).target_size(112, 84)
        assert is_near(small, Image.new("RGB", small.size, colour))


def test_a_region_has_the_pixels_of_its_crop() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    crop = noise.crop((40, 60, 264, 228))
    region = Region(data=encoded(noise, "PNG"), box=(0.1, 0.2, 0.66, 0.76))
    for rule in (PixelRule(max_pixels=10**6), PixelRule(max_pixels=56 * 56)):
        assert decode_pixels(region, rule).tobytes() == decode_pixels(encoded(crop, "PNG"), rule).tobytes()


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 500), st.integers(1, 500))
def test_a_region_has_a_pixel_at_least_and_is_within_the_picture(
    left: float, top: float, right: float, bottom: float, width: int, height: int
) -> None:
    if left >= right or top >= bottom:
        with pytest.raises(ValueError, match="no part of a picture"):
            Region(data=b"", box=(left, top, right, bottom))
        return
    x0, y0, x1, y1 = Region(data=b"", box=(left, top, right, bottom)).place(width, height)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def test_a_jpeg_is_decoded_no_larger_than_needed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    size = PixelRule(max_pixels=112 * 112).target_size(640, 480)
    whole, eighths = (Image.open(io.BytesIO(data)) for _ in range(2))
    eighths.draft(None, size)
    expected, other = (image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0) for image in (eighths, whole))
    assert eighths.width < whole.width and expected.tobytes() != other.tobytes()
    assert decode_pixels(data, PixelRule(max_pixels=112 * 112)).tobytes() == expected.tobytes()


def test_bytes_that_are_sent_unchanged_have_the_same_pixels() -> None:
    plain = encoded(corners(112, 84), "JPEG")
    assert can_send_unchanged(plain, PixelRule(max_pixels=112 * 84))
    assert (
        Image.open(io.BytesIO(plain)).convert("RGB").tobytes()
        == decode_pixels(plain, PixelRule(max_pixels=112 * 84)).tobytes()
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    for other in (
        encoded(corners(112, 112), "JPEG"),
        encoded(corners(112, 80), "JPEG"),
        encoded(corners(112, 84), "JPEG", exif=exif),
        encoded(corners(112, 84).convert("RGBA"), "PNG"),
        encoded(corners(112, 84), "TIFF"),
        b"no image",
        b"",
    ):
        assert not can_send_unchanged(other, PixelRule(max_pixels=112 * 84))


def test_encode_lossless_keeps_every_pixel() -> None:
    picture = decode_pixels(encoded(corners(), "JPEG"), PixelRule(max_pixels=10**6))
    assert Image.open(io.BytesIO(encode_lossless(picture))).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", "empty", "no bytes"),
        (encoded(corners(), "JPEG")[:-9], "unreadable", "JPEG"),
        (b"\x00\x01\x02\x03binary", "unreadable", "00 01 02 03"),
        (b"<!DOCTYPE html><html>404", "unsupported", "HTML"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "unsupported", "SVG"),
        ("Just words, ünïcode.".encode(), "unsupported", "text"),
        (b"BMW is a car, and this no bitmap", "unsupported", "text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported", "PostScript"),
        (b'{"error": 404}', "unsupported", "JSON"),
    ],
)
def test_files_that_are_not_images_have_a_status_and_a_reason(data: bytes, status: str, words: str) -> None:
    found = probe(data)
    assert found.status == status and found.error is not None and words in found.error
    with pytest.raises(UndecodableError):
        decode_pixels(data, PixelRule(max_pixels=10**6))


def test_sizes_outside_the_limits_have_a_status() -> None:
    strip = encoded(corners(200, 8), "PNG")
    assert probe(strip).status == "too_small"
    assert probe(strip, limits=Limits(min_side=8)).status == "ok"
    picture = encoded(corners(), "PNG")
    found = probe(picture, limits=Limits(max_pixels=112 * 84 - 1))
    assert (found.status, found.width, found.height) == ("too_large", 112, 84)


def test_odd_files_print_no_warnings() -> None:
    """Pillow warns of broken EXIF. Runs in its own process, because pytest captures warnings."""
    code = "import sys; from pipeline.decoding.images import *; data = sys.stdin.buffer.read()"
    data = encoded(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    formats.import_readers()
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        probe(data)
    command = [sys.executable, "-c", f"{code}; probe(data); decode_pixels(data, PixelRule())"]
    done = subprocess.run(command, input=data, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert (done.stdout, done.stderr) == (b"", b"")


def make_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


LARGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize("is_late", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([make_chunk(b"iCCP", b"CMYK\0\0" + LARGE)], id="large profile"),
        pytest.param([make_chunk(b"iCCP", b"")], id="empty profile"),
        pytest.param([make_chunk(b"zTXt", b"workflow\0\0" + LARGE)], id="large zTXt"),
        pytest.param([make_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)], id="large iTXt"),
        pytest.param([make_chunk(b"zTXt", b"%d\0\0" % n + zlib.compress(bytes(10**6))) for n in range(70)], id="many"),
        pytest.param([make_chunk(b"tEXt", b"a\0b", crc=1)], id="wrong checksum"),
        pytest.param([make_chunk(b"eXIf", b"II*\0", crc=1)], id="wrong checksum of EXIF"),
        pytest.param([make_chunk(b"pHYs", b"\0\0")], id="short chunk"),
    ],
)
def test_side_chunks_of_a_png_do_not_decide_whether_it_is_read(chunks: list[bytes], is_late: bool) -> None:
    plain = encoded(corners(), "PNG")
    at = plain.index(b"IEND") - 4 if is_late else 33
    data = plain[:at] + b"".join(chunks) + plain[at:]
    assert (probe(data).status, probe(data).error) == ("ok", None)
    assert decode_pixels(data, PixelRule()).tobytes() == decode_pixels(plain, PixelRule()).tobytes()
    assert probe(data[: data.index(b"IDAT") + 40]).status == "unreadable"
    if is_late:
        assert not can_send_unchanged(data, PixelRule(factor=1, min_pixels=1))
