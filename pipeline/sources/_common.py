"""Decides what all sources mean by an image, by alt text and by metadata: a corpus reads the same in any wrapping.

It knows names and values. It refuses to know where they came from: files, tars and tables are the sources' matter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.records import Raw

IMAGES = {  # extensions that people give images, whether or not this machine can decode them
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "avifs", "heic"),
    *("heif", "jp2", "j2k", "jpx", "jxl", "ppm", "pgm", "pbm", "pnm", "tga", "ico", "svg", "psd"),
}
TEXTS = ("txt", "caption")  # extensions of a text about the image beside it
ALT_TEXTS = ("caption", "text", "TEXT", "txt")  # columns and JSON keys
MAX_IMAGE_BYTES = 1 << 30  # of one encoded image, for it is held in memory
MAX_TEXT_BYTES = 1 << 24  # of one text or JSON file
MAX_LEVELS = 64  # of JSON: deeper than anybody means, and less deep than other readers bear
MAX_HEX_BYTES = 64  # binary values up to this (hashes, ids) are kept as hex; longer ones are no metadata
ALT_TEXT_HELP = "the column or key that holds the alt text; empty: caption, text, TEXT or txt, the first there is"


def extension(name: str) -> str:
    """In lower case, without the dot; "" when there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_image(name: str) -> bool:
    return extension(name) in IMAGES


def describe(raw: Raw, fields: Mapping[str, Any], *, texts: Mapping[str, str] | None = None, column: str = "") -> Raw:
    """The sample with its alt text, where there is some, and with all else that is known of it as metadata.

    Args:
        fields: its columns, or the object in its JSON.
        texts: its text files by extension; they come before the fields.
        column: the one name to look for, of a text or a field; "" means the usual ones.
    """
    texts = texts or {}
    names = (column,) if column else ALT_TEXTS
    found = [(name, texts[name]) for name in ((column,) if column else TEXTS) if name in texts]
    found += [(name, _caption(fields[name])) for name in names if name in fields]
    alt_text = next((text for _, text in found if text.strip()), None)
    told = {name for name, text in found if text == alt_text}
    rest = {name: value for name, value in {**texts, **fields}.items() if name not in told or value != alt_text}
    return replace(raw, alt_text=None if alt_text is None else clean(alt_text), metadata=to_json(rest))


def _caption(value: Any) -> str:
    """A caption, or the first of several; anything else is none."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else ""


def text(data: bytes) -> str:
    """A text file's words: UTF-8, with what is not replaced, without a byte order mark and the last line's end."""
    return data.decode("utf-8-sig", "replace").rstrip("\r\n")


def from_json(data: bytes) -> dict[str, Any]:
    """The object in a JSON file. What is no object is kept under the name "json"; what cannot be read, as text."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {"json": text(data)}
    if not _is_shallow(value):
        return {"json": text(data)}
    return value if isinstance(value, dict) else {"json": value}


def _is_shallow(value: Any, levels: int = MAX_LEVELS) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def to_json(fields: Mapping[str, Any]) -> str:
    """Strict JSON, safe in Arrow and in DuckDB: NaN and infinity are null, dates ISO 8601, short binary values hex."""
    try:
        return clean(json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_plain))
    except (ValueError, TypeError):  # a number that JSON lacks, or a key that is no string
        return clean(json.dumps(_strict(fields), ensure_ascii=False, default=_plain))


def clean(text: str) -> str:
    """Without the halves of surrogate pairs that JSON may smuggle in: they cannot be written as UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex() if len(value) <= MAX_HEX_BYTES else None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _strict(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
