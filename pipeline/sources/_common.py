"""Images, alt text and metadata as all sources define them, so that a corpus reads the same in any wrapping.

It works on names and values, and refuses to know whether they came from files, tars or tables.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from pipeline import progress
from pipeline.records import Raw, replace_surrogates

IMAGES = {  # extensions in use for images, whether or not this machine decodes them
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "avifs", "heic"),
    *("heif", "jp2", "j2k", "jpx", "jxl", "ppm", "pgm", "pbm", "pnm", "tga", "ico", "svg", "psd"),
}
TEXTS = ("txt", "caption")  # extensions of a text about the image beside it
ALT_TEXTS = ("caption", "text", "TEXT", "txt")  # columns and JSON keys
MARKS = {  # byte order marks and their codecs; UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GUESSED_ENCODING = "cp1252"  # of a text without a mark that is not UTF-8
ENCODING = "text_encoding"  # the metadata of such a text
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")  # bytes that no text has
MAX_IMAGE_BYTES = 1 << 30  # of one encoded image, since it is held in memory
MAX_TEXT_BYTES = 1 << 24  # of one text or JSON file
MAX_LEVELS = 64  # of nested JSON: deeper than real metadata, and within what other readers accept
MAX_HEX_BYTES = 64  # binary values up to this (hashes, ids) are kept as hex; longer ones are not metadata
ALT_TEXT_HELP = "the column or key that holds the alt text; empty: caption, text, TEXT or txt, the first there is"


def parse_extension(name: str) -> str:
    """In lower case, without the dot; "" when there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_image(name: str) -> bool:
    return parse_extension(name) in IMAGES


def explain_size(num_bytes: int, limit: int) -> str | None:
    """The error of a file that is too large; None when it is not."""
    return f"its {num_bytes} bytes exceed the limit of {limit}" if num_bytes > limit else None


def add_text(raw: Raw, fields: Mapping[str, Any], *, files: Mapping[str, bytes] | None = None, column: str = "") -> Raw:
    """Adds alt text, where there is some, and everything else about the sample as metadata.

    Args:
        fields: its columns, or the object in its JSON.
        files: its text files by extension; they come before the fields.
        column: the only text or field to take alt text from; "" means the usual ones.
    """
    texts = {name: decode_text(data) for name, data in (files or {}).items()}
    if any(find_encoding(data) == GUESSED_ENCODING for data in (files or {}).values()):
        fields = {**fields, ENCODING: GUESSED_ENCODING}
    names = (column,) if column else ALT_TEXTS
    if any(isinstance(one := fields.get(name), bytes) and find_encoding(one) == GUESSED_ENCODING for name in names):
        fields = {**fields, ENCODING: GUESSED_ENCODING}
    candidates = [(name, texts[name]) for name in ((column,) if column else TEXTS) if name in texts]
    candidates += [(name, _first_string(fields[name])) for name in names if name in fields]
    inner = fields.get("json")  # a table that was made from tars has their JSON in a column, as an object or as text
    inner = parse_json(inner.encode(errors="replace")) if isinstance(inner, str) else inner
    if isinstance(inner, Mapping):
        candidates += [(f"json.{name}", _first_string(inner[name])) for name in names if name in inner]
    alt_text = next((text for _, text in candidates if text.strip()), None)
    used = {name for name, text in candidates if text == alt_text}
    rest = {name: value for name, value in {**texts, **fields}.items() if name not in used or value != alt_text}
    return replace(raw, alt_text=None if alt_text is None else replace_surrogates(alt_text), metadata=format_json(rest))


def report_alt_text(where: str, columns: Collection[str], *, candidates: Collection[str]) -> None:
    """Prints a line when no column has one of the usual names for alt text, yet others hold text."""
    if candidates and not set(ALT_TEXTS).intersection(columns):
        usual = f"{', '.join(ALT_TEXTS[:-1])} or {ALT_TEXTS[-1]}"
        progress.say(
            f"{where} has no column {usual}, so no alt text is read; to read some, set source.alt_text to one of "
            f"{', '.join(candidates)}"
        )


def _first_string(value: Any) -> str:
    """A caption, also in an object or as bytes, or the first of several that is not blank; "" for any other value."""
    values = value if isinstance(value, list) else [value]
    return next((text for text in map(_read_caption, values) if text.strip()), "")


def _read_caption(value: Any) -> str:
    if isinstance(value, Mapping):
        return next((one for name in ALT_TEXTS if isinstance(one := value.get(name), str) and one.strip()), "")
    if isinstance(value, bytes) and not CONTROLS.search(value):
        return decode_text(value)
    return value if isinstance(value, str) else ""


def find_encoding(data: bytes) -> str:
    """The codec of a text: that of its byte order mark, UTF-16 if it has NULs, UTF-8 if it is valid, otherwise
    `GUESSED_ENCODING`."""
    if codec := find_mark(data):
        return codec
    first, second = data[::2].count(0), data[1::2].count(0)
    if max(first, second) > len(data) / 4 and not min(first, second):  # UTF-16 without a mark: NUL beside ASCII letters
        return "utf-16-le" if second else "utf-16-be"
    try:
        data.decode()
    except UnicodeDecodeError:
        return GUESSED_ENCODING
    return "utf-8"


def find_mark(data: bytes) -> str | None:
    """The codec that a byte order mark names; None without a mark."""
    return next((codec for mark, codec in MARKS.items() if data.startswith(mark)), None)


def decode_text(data: bytes) -> str:
    """Decodes a text as in `find_encoding`, replacing invalid bytes, without the last line's end."""
    return data.decode(find_encoding(data), "replace").rstrip("\r\n")


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a JSON file, with its `ENCODING` if that was guessed.

    Another value is kept under the name "json"; invalid or too deep JSON, as text.
    """
    text = decode_text(data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if not _is_shallow(value):
        value = text
    fields = value if isinstance(value, dict) else {"json": value}
    return fields | ({ENCODING: GUESSED_ENCODING} if find_encoding(data) == GUESSED_ENCODING else {})


def loosen_name(name: str) -> str:
    """A file's name without what is commonly lost when it is copied into a table: outer blanks, the kind of slash, the
    case, and the composition of accents."""
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).strip().casefold().split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _is_shallow(value: Any, levels: int = MAX_LEVELS) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def format_json(fields: Mapping[str, Any]) -> str:
    """Strict JSON, safe in Arrow and in DuckDB: NaN and infinity are null, dates ISO 8601, short binary values hex."""
    try:
        return replace_surrogates(json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_convert_value))
    except (ValueError, TypeError):  # a number that JSON lacks, or a key that is not a string
        return replace_surrogates(json.dumps(_make_strict(fields), ensure_ascii=False, default=_convert_value))


def _convert_value(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex() if len(value) <= MAX_HEX_BYTES else None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _make_strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _make_strict(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_make_strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
