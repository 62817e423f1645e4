"""Named queries, and the output formats of query results."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from importlib import resources
from itertools import chain, count
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import QueryError, UnknownNameError
from pipeline.plugins import explain_unknown
from pipeline.progress import escape_controls
from pipeline.storage import database

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CELL = 100  # characters of a value in a text table on a terminal


def list_queries() -> list[tuple[str, str]]:
    """The named queries, each with the sentence at its top."""
    files = sorted((resources.files("manifests") / "queries").iterdir(), key=lambda file: file.name)
    return [(file.name.removesuffix(".sql"), file.read_text().splitlines()[0].removeprefix("-- ")) for file in files]


def read_query(name: str) -> str:
    """The SQL of a named query.

    Raises:
        UnknownNameError: there is none of that name.
    """
    names = [known for known, _ in list_queries()]
    if name not in names:
        raise UnknownNameError(f"query {explain_unknown(name, names)}")
    return (resources.files("manifests") / "queries" / f"{name}.sql").read_text(encoding="utf-8")


def print_query(connection: database.Connection, sql: str, format: str, out: IO[bytes]) -> None:
    """Runs a reading statement and prints its rows: as a text table, csv, json (a list of objects) or parquet.

    Raises:
        QueryError: it is not a reading statement, or it fails.
    """
    if format == "parquet":
        print_parquet(database.read_arrow(connection, sql), out)
        return
    result = database.run_query(connection, sql)
    print_rows([column[0] for column in result.description or ()], database.fetch_rows(result), format, out)


def print_rows(names: list[str], rows: Iterable[tuple[Any, ...]], format: str, out: IO[bytes]) -> None:
    """Prints rows as they arrive: as a text table, csv or json. Long cells of a table are cut on a terminal only.

    Lists and structs are JSON in csv too, bytes hexadecimal. Of columns with one name, json and parquet number all but
    the first.
    """
    text = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    try:
        PRINTERS[format](names, rows, text)
    finally:
        text.detach()


def print_parquet(rows: pa.Table, out: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    intervals = [field.name for field in rows.schema if pa.types.is_interval(field.type)]
    if intervals:
        raise QueryError(f"Parquet has no intervals: write {intervals[0]}::VARCHAR in the query")
    with pa.BufferOutputStream() as buffer:
        pq.write_table(rows.rename_columns(_number_names(rows.column_names)), buffer)
        out.write(buffer.getvalue())


def _print_table(names: list[str], rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    most = MAX_CELL if out.isatty() else None
    cells = [[_format_cell(value, most) for value in row] for row in (names, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def _print_csv(names: list[str], rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(
            [_format_json(value) if isinstance(value, dict | list | tuple) else _convert_bytes(value) for value in row]
        )


def _print_json(names: list[str], rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    separator, names = "[\n", _number_names(names)
    for row in rows:
        text = _format_json(dict(zip(names, row, strict=True)), indent=2)
        out.write(separator + "  " + text.replace("\n", "\n  "))  # textwrap would break lines within strings
        separator = ",\n"
    out.write("[]\n" if separator == "[\n" else "\n]\n")


def _number_names(names: Sequence[str]) -> list[str]:
    """Different names, as DuckDB makes them: key, key_1.

    >>> _number_names(["key", "text", "key", "key"])
    ['key', 'text', 'key_1', 'key_2']
    """
    different: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in count(1))
        different[next(one for one in chain([name], numbered) if one not in different)] = None
    return list(different)


def _format_json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(
        _replace_infinite(value), indent=indent, ensure_ascii=False, default=_convert_value, allow_nan=False
    )


def _convert_value(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else str(_convert_bytes(value))


def _convert_bytes(value: Any) -> Any:
    """Bytes as hexadecimal digits; any other value as it is."""
    return value.hex() if isinstance(value, bytes | bytearray | memoryview) else value


def _replace_infinite(value: Any) -> Any:
    """The value with None for infinities and NaN, which JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_infinite(item) for key, item in value.items()}
    return [_replace_infinite(item) for item in value] if isinstance(value, list | tuple) else value


def _format_cell(value: Any, most: int | None) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return escape_controls(text if most is None or len(text) <= most else text[: most - 1] + "…")


PRINTERS = {"table": _print_table, "csv": _print_csv, "json": _print_json}
