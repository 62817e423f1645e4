"""Image probing and decoding: what counts as an image, and the pixels of it that a model sees.

This is the only module that touches pixels. It refuses to know where the bytes came from and what they are for. It
trusts no file: the size in a header is checked before anything of that size is allocated.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import machine
from pipeline.decoding import formats
from pipeline.decoding.measures import SIDE, measure_luminance
from pipeline.errors import UndecodableError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

    from pipeline.records import ImageStatus

T = TypeVar("T")
# Raised by Pillow's readers on corrupt files: they parse with struct and plain indexing and document no type.
# RuntimeError covers NotImplementedError. A MemoryError is handled apart: the header claims too large a size.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
)

EXIF_POINTERS = (None, "ExifOffset", "GPSInfo", "MakerNote", "InteropOffset")  # and what has no name
MAX_MEMORY = 4 << 30  # bytes that decoding one image may take
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # chunks that decide the picture; eXIf turns it
MIN_PIXELS = 56 * 56  # Qwen2-VL's own minimum
MAX_PIXELS = 1280 * 28 * 28  # 1280 image tokens of a Qwen2.5-VL
MAX_ASPECT = 200  # Qwen2-VL's processor rejects longer strips


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes that are decoded. The largest photographs of today's cameras have 200 million pixels."""

    min_side: int = 16  # pixels; smaller images are tracking pixels and bullets
    max_pixels: int = 2**28  # width x height, checked in the header before anything is decoded


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The properties of one file. Sizes are as displayed: after the EXIF orientation."""

    status: ImageStatus
    error: str | None  # a sentence; None when ok
    format: str | None  # Pillow's name in lower case; None when no format was recognised
    width: int | None  # pixels; from the header when the rest could not be read
    height: int | None
    orientation: int | None  # EXIF, 1 to 8
    num_frames: int | None
    sha256: str  # of the bytes, hex
    is_doubtful: bool = False  # memory ran out or the decoder was killed: the file may be sound
    phash: str | None = None  # perceptual hash, 256 bits in hex; None: not measured, or a flat picture
    entropy: float | None = None  # [0, 8] bits a pixel of the reduced luminance; None: not measured


def probe_and_measure(data: bytes, *, limits: Limits | None = None) -> Probe:
    """As `probe`, with the perceptual hash and the entropy. A JPEG is decoded at 1/8 to 1/1 of its size."""
    return probe(data, limits=limits, measure=True)


def probe(data: bytes, *, limits: Limits | None = None, measure: bool = False) -> Probe:
    """Decodes the whole first frame of `data` once. Never raises, whatever the data is.

    A JPEG is decoded at 1/8 of its size. That reads every bit, so it detects truncated and corrupt data like a full
    decode, but skips most arithmetic on pixels.
    """
    state = _ProbeState(data, measure)
    try:
        _inspect_image(state, limits or Limits())
    except _ProbeError as error:
        return state.make_probe(error.status, str(error))
    except MemoryError:
        problem = f"a {state.format} file that needs more memory than decoding may use"
        return replace(state.make_probe("unreadable", problem), is_doubtful=True)
    except BROKEN as error:
        return state.make_probe("unreadable", _describe_error(state.format, error))
    return state.make_probe("ok", None)


class _ProbeError(Exception):
    def __init__(self, status: ImageStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _ProbeState:
    """The properties read so far, so that an error at any point reports all of them."""

    def __init__(self, data: bytes, measure: bool) -> None:
        self.data, self.measure = data, measure
        self.measured: tuple[str | None, float | None] = (None, None)  # perceptual hash, entropy
        self.format: str | None = None
        self.size: tuple[int, int] | None = None  # as displayed
        self.orientation: int | None = None
        self.num_frames: int | None = None

    def make_probe(self, status: ImageStatus, error: str | None) -> Probe:
        width, height = self.size or (None, None)
        phash, entropy = self.measured
        return Probe(
            status=status,
            error=error,
            format=self.format and self.format.lower(),
            width=width,
            height=height,
            orientation=self.orientation,
            num_frames=self.num_frames,
            sha256=hashlib.sha256(self.data).hexdigest(),
            phash=phash,
            entropy=entropy,
        )


def _inspect_image(state: _ProbeState, limits: Limits) -> None:
    state.format = _require_format(state.data)
    try:
        _inspect_data(state, state.data, state.format, limits)
    except BROKEN:
        if state.format != "PNG":
            raise
        _inspect_data(state, _drop_side_chunks(state.data), state.format, limits)


def _inspect_data(state: _ProbeState, data: bytes, name: str, limits: Limits) -> None:
    image = _open_image(data, name)
    header = image.size
    state.orientation = _read_orientation(image)
    state.size = _apply_orientation(header, state.orientation, name)
    _check_size(state.size, limits)
    if name == "JPEG":
        width, height = state.size
        if width * height > 64 * 8 * len(data):  # libjpeg fills missing data with grey, but 8x8 pixels take a bit
            message = f"a JPEG file of {len(data)} bytes cannot hold the {width}x{height} pixels of its header"
            raise _ProbeError("unreadable", message)
        image.draft(None, (SIDE, SIDE) if state.measure else (1, 1))
    _load_pixels(image)
    if name == "PNG":  # its EXIF may follow the pixels
        state.orientation = _read_orientation(image)
        state.size = _apply_orientation(header, state.orientation, name)
    if state.measure:
        luminance = _reduce_luminance(image)
        upright = luminance if name == "TIFF" else _turn_upright(luminance, state.orientation)
        state.measured = measure_luminance(upright)
    state.num_frames = _count_frames(image)


def _reduce_luminance(image: ImageFile) -> Picture:
    """The luminance at `SIDE` x `SIDE`, with transparent areas on white; large pictures are converted once reduced."""
    from PIL.Image import Resampling

    picture: Picture = image
    if image.mode.startswith(("I", "F")) or not (image.has_transparency_data or image.mode in ("L", "RGB")):
        picture = _convert_to_rgb(image)
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
    reduced = picture.resize((SIDE, SIDE), Resampling.BILINEAR, reducing_gap=3.0)
    return _convert_to_rgb(reduced).convert("L")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if min(size) < limits.min_side:
        raise _ProbeError("too_small", f"{width}x{height} is too small; the minimum side is {limits.min_side}")
    if width * height > limits.max_pixels:
        raise _ProbeError(
            "too_large", f"{width}x{height} is {width * height} pixels; the maximum is {limits.max_pixels}"
        )


def _require_format(data: bytes) -> str:
    if not data:
        raise _ProbeError("empty", "the file has no bytes")
    if name := formats.detect_format(data):
        return name
    if name := formats.describe_foreign(data):
        raise _ProbeError("unsupported", f"it looks like {name}, which is not a supported image format")
    raise _ProbeError("unreadable", f"no image format begins with the bytes {data[:8].hex(' ')}")


def _open_image(data: bytes, name: str) -> ImageFile:
    """Reads the header. Calls the reader directly: `PIL.Image.open` guesses, and its bomb limit is a global."""
    with _convert_bomb_errors():
        return formats.import_readers()[name](io.BytesIO(data))


def _list_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name and all bytes of each chunk of a PNG; the last may be cut off."""
    at, kind = 8, b""
    while at < len(data) and kind != b"IEND":
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield kind, data[at : at + 12 + size]
        at += 12 + size


def _drop_side_chunks(data: bytes) -> bytes:
    """A PNG without texts, profiles and animation, and without optional chunks whose checksum is wrong, as libpng does.

    Pillow refuses the whole file for any of those.
    """
    kept = [data[:8]]
    for kind, chunk in _list_chunks(data):
        is_required = kind[:1].isupper()
        if kind in PNG_PIXELS and (is_required or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")):
            kept.append(chunk)
    return b"".join(kept)


def _load_pixels(image: ImageFile) -> None:
    with _convert_bomb_errors():
        image.load()


@contextmanager
def _convert_bomb_errors() -> Iterator[None]:
    """Some readers check sizes themselves: an icon's inner PNG, a GIF's first frame against its screen."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except DecompressionBombError as error:
        raise _ProbeError("too_large", str(error)) from error


def _describe_error(name: str | None, error: Exception) -> str:
    words = " ".join(str(error).split())[:200]
    is_readable = isinstance(error, OSError | SyntaxError | ValueError) and words
    return f"a {name} file that cannot be read: {words if is_readable else f'{type(error).__name__} {words}'.strip()}"


def _read_orientation(image: ImageFile) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if missing or invalid. Pillow turns the pixels of a TIFF on loading."""
    if image.format == "PNG" and image.tile and "exif" not in image.info:
        return 1  # reading it would load the pixels
    try:
        value = image.getexif().get(0x0112, 1)
    except BROKEN:  # broken EXIF does not break the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def read_exif(data: bytes) -> dict[str, str]:
    """The fields of an image's EXIF by name, as text; coordinates of GPS in degrees. Reads the header; never raises.

    Binary fields, and those without a name, are left out.
    """
    from PIL.ExifTags import GPSTAGS, IFD, TAGS

    found: dict[str, str] = {}
    try:
        name = _require_format(data)
        image = _open_image(data, name)
        if name == "PNG" and "exif" not in image.info:
            return {}  # reading it would load the pixels
        exif = image.getexif()
        gps = exif.get_ifd(IFD.GPSInfo)
        fields = {TAGS.get(tag): value for tag, value in {**exif, **exif.get_ifd(IFD.Exif)}.items()}
        fields |= {GPSTAGS.get(tag): value for tag, value in gps.items()}
        for place, west in (("GPSLatitude", "S"), ("GPSLongitude", "W")):
            if place in fields:
                fields[place] = _read_degrees(fields[place], fields.get(f"{place}Ref") == west)
        found = {str(field): _format_exif(value) for field, value in fields.items() if field not in EXIF_POINTERS}
    except (*BROKEN, _ProbeError):  # broken EXIF does not break the image
        return {}
    return {field: text for field, text in found.items() if text}


def _read_degrees(value: Any, is_negative: bool) -> float:
    degrees: float = sum(float(part) / 60**power for power, part in enumerate(value))
    return round(-degrees if is_negative else degrees, 6)


def _format_exif(value: Any) -> str:
    if isinstance(value, bytes):
        return ""
    values = value if isinstance(value, tuple) else (value,)
    return ", ".join(str(one).replace("\0", "").strip() for one in values if not isinstance(one, bytes | dict))


def _apply_orientation(size: tuple[int, int], orientation: int, name: str) -> tuple[int, int]:
    """Returns the size after turning. Pillow reports that of a TIFF as displayed."""
    return size[::-1] if orientation >= 5 and name != "TIFF" else size


def _count_frames(image: ImageFile) -> int | None:
    try:
        with _convert_bomb_errors():
            return int(getattr(image, "n_frames", 1))
    except (*BROKEN, _ProbeError):  # a later frame is broken; only the first is used
        return None


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of an image file, which a model is shown like an image of its own."""

    data: bytes
    box: tuple[float, float, float, float]  # left, top, right, bottom; [0, 1] of the picture as displayed

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{self.box} is no part of a picture: left, top, right, bottom, from 0 to 1")

    def place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns its left, top, right and bottom in pixels, where the whole picture has `width` x `height`."""
        left, top = (min(round(at * side), side - 1) for at, side in zip(self.box[:2], (width, height), strict=True))
        return left, top, max(left + 1, round(self.box[2] * width)), max(top + 1, round(self.box[3] * height))


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """The sizes at which a model sees images. The defaults are Qwen2-VL's."""

    max_pixels: int = MAX_PIXELS  # width x height
    min_pixels: int = MIN_PIXELS
    factor: int = 28  # both sides are multiples of it; 1: any size

    @classmethod
    def from_processor(cls, processor: Any, *, max_pixels: int = MAX_PIXELS) -> PixelRule:
        """Returns the rule of a transformers processor of the Qwen-VL family, with the smaller of the two maxima.

        Any other processor resizes images itself: only `max_pixels` applies.
        """
        own = getattr(processor, "image_processor", None)
        size = getattr(own, "size", None) or {}
        get_size = size.get if isinstance(size, dict) else partial(getattr, size)
        numbers: list[Any] = [get_size(edge, None) for edge in ("shortest_edge", "longest_edge")]  # Qwen counts pixels
        numbers += [getattr(own, name, None) for name in ("patch_size", "merge_size")]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            return cls(max_pixels=max_pixels, min_pixels=1, factor=1)
        least, most, patch, merge = numbers
        return cls(max_pixels=min(max_pixels, most), min_pixels=least, factor=patch * merge)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height at which the model sees an image of `width` x `height`.

        Both are multiples of `factor`, their product is within the bounds, and the aspect ratio is kept as far as that
        allows. This is `smart_resize` of transformers, repeated until it changes nothing, because the model's processor
        applies it to what it is sent. Once is enough except for strips at the upper bound.

        Raises:
            UndecodableError: one side is more than 200 times the other, which the model's processor refuses.
        """
        size = (width, height)
        for _ in range(8):  # it may alternate when the two bounds are close
            if max(size) > MAX_ASPECT * min(size):
                raise UndecodableError(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
            rounded = self._round_size(*size)
            if rounded == size:
                break
            size = rounded
        return size

    def _round_size(self, width: int, height: int) -> tuple[int, int]:
        factor = self.factor
        w, h = (round(side / factor) * factor for side in (width, height))
        if w * h > self.max_pixels:
            shrink = math.sqrt((width * height) / self.max_pixels)
            w, h = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
        elif w * h < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            w, h = (math.ceil(side * grow / factor) * factor for side in (width, height))
        return w, h


def decode_pixels(image: bytes | Region, rule: PixelRule) -> Picture:
    """Decodes the first frame of an image file, or a region of it, in RGB, upright, on white, at `rule.target_size`.

    A JPEG is decoded at the smallest of its own scales (1, 1/2, 1/4, 1/8) that covers the target.

    Raises:
        UndecodableError: the file is not an image, is corrupt, or is larger than `Limits` allows.
        OutOfMemoryError: there is less memory than an image may need.
    """
    if isinstance(image, Region):
        return _decode(image.data, partial(_decode_region, region=image, rule=rule))
    return _decode(image, partial(_decode_image, rule=rule))


def decode_upright(data: bytes) -> tuple[Picture, str]:
    """Decodes the first frame of `data` at its own size and in its own mode, upright; returns it and the format's name.

    Its `info` has the EXIF, without the orientation, and the colour profile of the file.

    Raises:
        UndecodableError: as `decode_pixels`.
    """
    return _decode(data, _decode_whole)


def _decode(data: bytes, decode: Callable[[ImageFile, str], T]) -> T:
    """Opens an image and decodes it with `decode`, of PNGs also without side chunks that Pillow refuses."""
    name = None
    try:
        name = _require_format(data)
        return _open_and_decode(data, name, decode)
    except _ProbeError as error:
        raise UndecodableError(str(error)) from error
    except UndecodableError:
        raise
    except (*BROKEN, MemoryError) as error:
        if isinstance(error, MemoryError):
            machine.rule_out(error, partial(_open_and_decode, data, str(name), decode), needed=MAX_MEMORY)
        raise UndecodableError(_describe_error(name, error)) from error


def _open_and_decode(data: bytes, name: str, decode: Callable[[ImageFile, str], T]) -> T:
    try:
        return decode(_open_image(data, name), name)
    except BROKEN:
        if name != "PNG":
            raise
        return decode(_open_image(_drop_side_chunks(data), name), name)


def _decode_whole(image: ImageFile, name: str) -> tuple[Picture, str]:
    from PIL.ImageOps import exif_transpose

    _check_size(image.size, Limits(min_side=1))
    _load_pixels(image)
    try:
        return exif_transpose(image), name
    except BROKEN:  # an EXIF that can be read but not written is dropped
        picture = _turn_upright(image, _read_orientation(image))
        picture.info = {}
        return picture, name


def _decode_image(image: ImageFile, name: str, rule: PixelRule) -> Picture:
    from PIL.Image import Resampling

    header = image.size
    _check_size(header, Limits(min_side=1))
    if name == "PNG":
        _load_pixels(image)
    orientation = _read_orientation(image)
    displayed = _apply_orientation(header, orientation, name)
    size = rule.target_size(*displayed)
    stored = _apply_orientation(size, orientation, name)  # turning twice restores it
    if name == "JPEG":
        image.draft(None, stored)
    _load_pixels(image)
    picture = _convert_to_rgb(image)
    if picture.size != stored:
        picture = picture.resize(stored, Resampling.BICUBIC, reducing_gap=3.0)
    return picture if name == "TIFF" else _turn_upright(picture, orientation)


def _decode_region(image: ImageFile, name: str, region: Region, rule: PixelRule) -> Picture:
    from PIL.Image import Resampling

    _check_size(image.size, Limits(min_side=1))
    if name == "PNG":
        _load_pixels(image)
    orientation = _read_orientation(image)
    displayed = _apply_orientation(image.size, orientation, name)
    left, top, right, bottom = region.place(*displayed)
    size = rule.target_size(right - left, bottom - top)
    if name == "JPEG":
        whole = math.ceil(displayed[0] * size[0] / (right - left)), math.ceil(displayed[1] * size[1] / (bottom - top))
        image.draft(None, _apply_orientation(whole, orientation, name))
    _load_pixels(image)
    picture = _convert_to_rgb(image)
    picture = picture if name == "TIFF" else _turn_upright(picture, orientation)
    part = picture.crop(region.place(*picture.size))
    return part if part.size == size else part.resize(size, Resampling.BICUBIC, reducing_gap=3.0)


def _turn_upright(picture: Picture, orientation: int) -> Picture:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _convert_to_rgb(image: Picture) -> Picture:
    """Converts to RGB, with transparent areas on white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of taking the upper byte.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        image = _stretch_contrast(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _stretch_contrast(image: Picture) -> Picture:
    """Scales 32-bit values to black and white at their extremes, unless they fit a byte: such modes define no white."""
    low, high = image.convert("F").getextrema()
    assert isinstance(low, float) and isinstance(high, float)
    if image.mode == "I" and low >= 0 and high <= 255:
        return image.convert("L")
    scale = 255 / (high - low) if high > low else 0.0
    return image.convert("F").point(lambda value: value * scale + -low * scale).convert("L")


def can_send_unchanged(data: bytes, rule: PixelRule) -> bool:
    """Tests whether any reader decodes the bytes to exactly the pixels of `decode_pixels`. Reads only the header."""
    try:
        name = _require_format(data)
        image = _open_image(data, name)
        size = rule.target_size(*image.size)
        return name in ("JPEG", "PNG") and image.size == size and _is_plain(image) and not _has_late_chunks(data, name)
    except (*BROKEN, _ProbeError):
        return False


def _has_late_chunks(data: bytes, name: str) -> bool:
    """True when a PNG has texts or EXIF behind its pixels, which other readers may refuse."""
    return name == "PNG" and [kind for kind, _ in _list_chunks(data)][-2:] != [b"IDAT", b"IEND"]


def _is_plain(image: ImageFile) -> bool:
    plain = image.mode in ("L", "RGB") and not image.has_transparency_data
    return plain and _read_orientation(image) == 1 and getattr(image, "n_frames", 1) == 1


def encode_lossless(picture: Picture) -> bytes:
    """Encodes a PNG, for speed rather than size: it is sent once."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
