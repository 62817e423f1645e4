"""Decides what the columns of a table of images mean: which is the image, which its name, and that the rest is words.

It knows Arrow, and nothing of files: Parquet and `datasets` both end here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, UnusableFileError
from pipeline.records import Raw
from pipeline.sources import _common, _files

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
KEY_NAMES = ("__key__", "key", "uid", "id")
IMAGE_HELP = "the column with the images; empty: the one that is called an image, or that alone holds bytes"
KEY_HELP = "the column with the samples' names; empty: __key__, key, uid or id, else the image's path, else the row"
MAX_BYTES = 1 << 26  # of rows that become Python's at a time, when there are more than one
ROOT_HELP = "the folder of the images for rows that have only a path to theirs; no path outside it is opened"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read, and what for."""

    image: str
    source_key: str  # "": the image's path, or the row's number
    alt_text: str  # "": where it usually is
    words: tuple[str, ...]  # all others that JSON can hold

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys([self.image, *([self.source_key] if self.source_key else []), *self.words]))


def choose(schema: pa.Schema, *, image: str, source_key: str, alt_text: str) -> Columns:
    """What the columns are, as the config says or, where it says "", as their names and types do.

    Raises:
        ConfigError: a column that the config names is not there, or the one with the images cannot be told.
    """
    if len(set(schema.names)) < len(schema.names):
        raise ConfigError("source.path", f"there are two columns of one name among {', '.join(schema.names)}")
    for field, name in (("image", image), ("source_key", source_key), ("alt_text", alt_text)):
        if name and name not in schema.names:
            raise ConfigError(f"source.{field}", f"there is no column {name!r}; there are {', '.join(schema.names)}")
    image = image or _image(schema)
    if not _holds_images(schema.field(image).type):
        raise ConfigError("source.image", f"column {image!r} holds {schema.field(image).type}, not image files")
    source_key = source_key or next((name for name in KEY_NAMES if name in schema.names and name != image), "")
    words = tuple(field.name for field in schema if field.name not in (image, source_key) and _holds_words(field.type))
    return Columns(image=image, source_key=source_key, alt_text=alt_text, words=words)


def _image(schema: pa.Schema) -> str:
    candidates = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in [*_features(schema), *IMAGE_NAMES] if name in candidates]
    if named or len(candidates) == 1:
        return (named or candidates)[0]
    if not candidates:
        raise ConfigError("source.image", f"no column holds image files; there are {', '.join(schema.names)}")
    raise ConfigError("source.image", f"which column holds the images? image = ... is one of {', '.join(candidates)}")


def _features(schema: pa.Schema) -> list[str]:
    """The columns that `datasets` wrote as images: it says so beside the schema."""
    found: Any = _common.from_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    for name in ("info", "features"):
        found = found.get(name) if isinstance(found, dict) else None
    features = found if isinstance(found, dict) else {}
    return [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]


def _holds_images(type: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(type):
        return type.get_field_index("bytes") >= 0 and _holds_images(type.field("bytes").type)
    return _is_binary(type) or pa.types.is_null(type)


def _holds_words(type: pa.DataType) -> bool:
    """Not long binary values, which are no words, and of which one would read many bytes for nothing."""
    import pyarrow as pa

    if pa.types.is_fixed_size_binary(type):
        return bool(type.byte_width <= _common.MAX_HEX_BYTES)
    return not _is_binary(type) and not (pa.types.is_struct(type) and _holds_images(type))


def _is_binary(type: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type))


def raws(
    rows: pa.RecordBatch | pa.Table, columns: Columns, *, first: int, name: str, roots: Sequence[str] = ()
) -> Iterator[Raw]:
    """The samples in some rows.

    Args:
        first: the number of the first of the rows, which names samples that nothing else names.
        name: what the rows are of, to stand before their numbers.
        roots: folders in which an image may lie of which the row has only the path.
    """
    for number, row in enumerate(values(rows.select(columns.all)), first):
        image = row.pop(columns.image)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, None)
        path = path if isinstance(path, str) else ""
        known = row.pop(columns.source_key, None)
        key = _relative(path, roots) if known in (None, "") else str(known)
        raw = Raw(source_key=_common.clean(key) or f"{name}:{number}", data=None)
        yield _common.describe(_with_image(raw, data, path, roots), row, column=columns.alt_text)


def lost(row: int, *, name: str, error: str) -> Raw:
    """A row of which nothing is known but its number."""
    return Raw(source_key=f"{name}:{row}", data=None, error=error)


def values(rows: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as Python has them, large ones one by one.

    Text is UTF-8, with what is not replaced; what Python cannot have says why.
    """
    if rows.num_rows > 1 and rows.nbytes > MAX_BYTES:
        for number in range(rows.num_rows):
            yield from values(rows.slice(number, 1))
        return
    try:
        yield from rows.to_pylist()
    except (ValueError, OverflowError):  # text that is no UTF-8, a date before the year 1
        for number in range(rows.num_rows):
            yield {name: _value(rows.column(name)[number]) for name in rows.schema.names}


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "replace")
    except (ValueError, OverflowError) as error:
        return {"error": str(error)}  # no words, or it would be taken for alt text


def _relative(path: str, roots: Sequence[str]) -> str:
    return next((path.removeprefix(f"{root}/") for root in roots if path.startswith(f"{root}/")), path)


def _with_image(raw: Raw, data: Any, path: str, roots: Sequence[str]) -> Raw:
    if isinstance(data, bytes) and len(data) > _common.MAX_IMAGE_BYTES:
        error = f"its {len(data)} bytes are more than the {_common.MAX_IMAGE_BYTES} that one may have"
        return replace(raw, error=error)
    if isinstance(data, bytes):
        return replace(raw, data=data)
    if data is not None:
        return replace(raw, error=f"the image is of the type {type(data).__name__}, not bytes")
    if not path:
        return replace(raw, error="the row has no image")
    error = "URLs are not fetched" if _files.is_url(path) else "set source.image_root to open it"
    for root in () if _files.is_url(path) else roots:
        try:
            return replace(raw, data=_files.inside(str(Path(root, path)), root, most=_common.MAX_IMAGE_BYTES))
        except UnusableFileError as unusable:
            error = str(unusable)
    return replace(raw, error=f"the row has only the path {path!r} of its image: {error}")
