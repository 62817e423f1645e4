"""Columns of image tables: which one holds the image, which its name, and which are metadata.

It works on Arrow schemas and rows, for Parquet and `datasets` alike, and refuses to know about files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, UnusableFileError
from pipeline.records import Raw, replace_surrogates
from pipeline.sources import _common, _files, _trees

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
NO_IMAGE_NAMES = re.compile(r"(.*_)?(sha\d*|md5|crc32|\w*hash|digest|url|uuid|embedding)|thumb(nail)?", re.IGNORECASE)
KEY_NAMES = ("__key__", "key", "uid", "id")
IMAGE_HELP = "the column with the images; empty: the one named like an image, or the only one that holds bytes"
KEY_HELP = "the column with the samples' names; empty: __key__, key, uid or id, else the image's path, else the row"
ROOT_HELP = "the folder of the images for rows that have only a path to theirs; no path outside it is opened"
MAX_SHORT_BYTES = 1 << 12  # on average, of binary values that are read as metadata
MAX_BYTES = 1 << 26  # of rows converted to Python at a time, when there are more than one


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read, by use."""

    image: str
    source_key: str  # "": the image's path, or the row's number
    alt_text: str  # "": the usual names
    metadata: tuple[str, ...]  # all others that JSON can hold

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.image, *([self.source_key] if self.source_key else []), *self.metadata]))


def choose_columns(
    schema: pa.Schema, *, image: str, source_key: str, alt_text: str, short: Collection[str] = ()
) -> Columns:
    """Takes the columns that the config names and, for each "", finds one by name and type.

    Args:
        short: columns of binary values that are short enough for metadata, since texts may lack their annotation.

    Raises:
        ConfigError: a column that the config names is missing, or no one column is clearly the images'.
    """
    if len(set(schema.names)) < len(schema.names):
        raise ConfigError("source.path", f"has two columns of one name among {', '.join(schema.names)}")
    for field, name in (("image", image), ("source_key", source_key), ("alt_text", alt_text)):
        if name and name not in schema.names:
            raise ConfigError(f"source.{field}", f"there is no column {name!r}; there are {', '.join(schema.names)}")
    image = image or _find_image_column(schema)
    if not _holds_images(schema.field(image).type):
        raise ConfigError("source.image", f"column {image!r} holds {schema.field(image).type}, not image files")
    source_key = source_key or next((name for name in KEY_NAMES if name in schema.names and name != image), "")
    texts = {*short, *_common.ALT_TEXTS, alt_text}
    metadata = tuple(
        f.name
        for f in schema
        if f.name not in (image, source_key) and (_holds_metadata(f.type) or (_is_binary(f.type) and f.name in texts))
    )
    return Columns(image=image, source_key=source_key, alt_text=alt_text, metadata=metadata)


def report_alt_text(schema: pa.Schema, columns: Columns) -> None:
    """Prints which columns might be the alt text, where none is taken for it."""
    texts = [field.name for field in schema if field.name in columns.metadata and _holds_text(field.type)]
    if not columns.alt_text and "json" not in columns.metadata:  # which may hold the caption
        _common.report_alt_text("the corpus", columns.metadata, candidates=texts)


def _find_image_column(schema: pa.Schema) -> str:
    candidates: list[str] = [field.name for field in schema if _holds_images(field.type)]
    preferred: list[str] = [name for name in [*_list_image_features(schema), *IMAGE_NAMES] if name in candidates]
    if preferred:
        return min(
            preferred, key=lambda name: _is_null(schema.field(name).type)
        )  # a column of nulls is the last choice
    if lists := [field.name for field in schema if _holds_image_lists(field.type)]:
        others = f"; or choose one of {', '.join(candidates)}" if candidates else ""
        message = f"column {lists[0]!r} holds lists of images, which are not supported: write one image a row{others}"
        raise ConfigError("source.image", message)
    if len(candidates) == 1 and not _is_other_name(candidates[0]):
        return candidates[0]
    if not candidates:
        raise ConfigError("source.image", f"no column holds image files; there are {', '.join(schema.names)}")
    problem = "several columns may hold the images" if len(candidates) > 1 else "no column is clearly the images'"
    raise ConfigError("source.image", f"{problem}; choose one of {', '.join(candidates)}")


def _is_other_name(name: str) -> bool:
    """True for a column of bytes that by its name holds something else: a hash, a text, an id."""
    return name in (*KEY_NAMES, *_common.ALT_TEXTS) or NO_IMAGE_NAMES.fullmatch(name) is not None


def _list_image_features(schema: pa.Schema) -> list[str]:
    """The columns that `datasets` wrote as images, from its metadata beside the schema."""
    node: Any = _common.parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    for name in ("info", "features"):
        node = node.get(name) if isinstance(node, dict) else None
    features = node if isinstance(node, dict) else {}
    return [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]


def _holds_images(type: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(type):
        return type.get_field_index("bytes") >= 0 and _holds_images(type.field("bytes").type)
    return _is_binary(type) or _is_null(type)


def _is_text(type: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _holds_text(type: pa.DataType) -> bool:
    """True also for lists of texts, such as several captions."""
    import pyarrow as pa

    is_list = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    return _is_text(type.value_type if is_list else type)


def _is_null(type: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_null(type))


def _holds_image_lists(type: pa.DataType) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    return is_list and not pa.types.is_null(type.value_type) and _holds_images(type.value_type)


def _holds_metadata(type: pa.DataType) -> bool:
    """False for long binary values, which JSON cannot hold and which would cost many bytes to read."""
    import pyarrow as pa

    if pa.types.is_fixed_size_binary(type):
        return bool(type.byte_width <= _common.MAX_HEX_BYTES)
    return not _is_binary(type) and not (pa.types.is_struct(type) and _holds_images(type))


def list_short_columns(table: pq.ParquetFile) -> list[str]:
    """The columns of short binary values: hashes, ids, and texts without the UTF-8 annotation."""
    if not table.metadata.num_row_groups:
        return []
    group = table.metadata.row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    return [
        chunk.path_in_schema for chunk in chunks if chunk.total_uncompressed_size <= MAX_SHORT_BYTES * group.num_rows
    ]


def _is_binary(type: pa.DataType) -> bool:
    import pyarrow as pa

    inner = type.value_type if pa.types.is_dictionary(type) else type  # a dictionary has each value once
    return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_binary_view(inner))


def read_samples(
    rows: pa.RecordBatch | pa.Table, columns: Columns, *, first: int, name: str, roots: Sequence[str] = ()
) -> Iterator[Raw]:
    """The samples in some rows.

    Args:
        first: the number of the first of the rows, for samples that have no other name.
        name: the table's name, which precedes the row number.
        roots: directories that may hold an image of which the row has only the path.
    """
    for number, row in enumerate(convert_rows(rows.select(columns.names)), first):
        image = row.pop(columns.image)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, None)
        path = path if isinstance(path, str) else ""
        key = _format_key(row.pop(columns.source_key, None))
        if not key:
            key = next((path.removeprefix(f"{root}/") for root in roots if path.startswith(f"{root}/")), path)
        row = {one: _read_text(value) for one, value in row.items()}
        raw = Raw(source_key=replace_surrogates(key) or f"{name}:{number}", data=None)
        yield _common.add_text(_add_image(raw, data, path, roots), row, column=columns.alt_text)


def _format_key(value: Any) -> str:
    """A sample's name as text: whole numbers without a fraction, bytes as text or hex; "" for NaN and none."""
    value = _read_text(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _read_text(value: Any) -> Any:
    """Bytes that are printable UTF-8 as text, in lists too; any other value unchanged."""
    if isinstance(value, list):
        return [_read_text(one) for one in value]
    if not isinstance(value, bytes):
        return value
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value
    return value if _common.CONTROLS.search(value) else text


def make_lost_row(row: int, *, name: str, error: str) -> Raw:
    """A row that cannot be read, known by its number alone."""
    return Raw(source_key=f"{name}:{row}", data=None, error=error)


def convert_rows(rows: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as Python objects, large ones one by one.

    Invalid UTF-8 is replaced; a value that Python cannot represent becomes `{"error": reason}`.
    """
    if rows.num_rows > 1 and rows.nbytes > MAX_BYTES:
        for number in range(rows.num_rows):
            yield from convert_rows(rows.slice(number, 1))
        return
    try:
        yield from rows.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date before the year 1
        for number in range(rows.num_rows):
            yield {name: _convert_scalar(rows.column(name)[number]) for name in rows.schema.names}


def _convert_scalar(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "replace")
    except (ValueError, OverflowError) as error:
        return {"error": str(error)}  # an object, since a string could be taken for alt text


def _add_image(raw: Raw, data: Any, path: str, roots: Sequence[str]) -> Raw:
    """Adds the bytes from the row or from the file at its path, or the reason why there are none."""
    if isinstance(data, bytes):
        error = _common.explain_size(len(data), _common.MAX_IMAGE_BYTES)
        return replace(raw, data=None if error else data, error=error)
    if data is not None:
        return replace(raw, error=f"the image is of the type {type(data).__name__}, not bytes")
    if not path:
        return replace(raw, error="the row has no image")
    is_zipped = path.startswith("zip://") and not _files.is_url(path.partition("::")[2])
    is_url = _files.is_url(path) and not is_zipped
    error = "URLs are not fetched" if is_url else "set source.image_root to open it"
    for root in () if is_url else roots:
        try:
            if is_zipped and not _files.is_url(root):
                return replace(raw, data=_files.read_zipped(path, root, limit=_common.MAX_IMAGE_BYTES))
            if _files.is_url(root):
                tree = _trees.open_tree(root, follow_links=False)
                return replace(raw, data=tree.read(path, limit=_common.MAX_IMAGE_BYTES))
            return replace(raw, data=_files.read_inside(str(Path(root, path)), root, limit=_common.MAX_IMAGE_BYTES))
        except UnusableFileError as unusable:
            error = str(unusable)
    return replace(raw, error=f"the row has only the path {path!r} of its image: {error}")
