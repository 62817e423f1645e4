"""Decides how a run is asked in SQL: DuckDB over its Parquet files, read-only, seeing nothing outside the run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline import plugins
from pipeline.errors import MachineError, QueryError, UnknownName
from pipeline.records import Caption, Exported, Image, Planned, Record, Rubric, Score, Stat, Step, Verdict, schema

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

RECORDS: tuple[type[Record], ...] = (Planned, Image, Caption, Rubric, Score, Verdict, Step, Stat, Exported)
VOLATILE = "SELECT function_name FROM duckdb_functions() WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')"
QUIET = "SET enable_progress_bar = false"  # it would go to standard output, which is data
MAX_CELL = 100  # characters of a value in a table for people


def connect(
    folder: Path, *, files: str = "*.parquet", where: Mapping[str, str] | None = None
) -> duckdb.DuckDBPyConnection:
    """A connection with the views of manifests/views.sql over one run, locked into it.

    Args:
        folder: the run.
        files: which table files the views see; one shard's when it is `00007.parquet`.
        where: view -> the condition for those of its rows that are shown.
    """
    import duckdb

    run = folder.absolute()
    connection = duckdb.connect(config={} if files == "*.parquet" else {"threads": 2})
    connection.execute(QUIET)
    connection.execute(f"SET allowed_directories = [{literal(str(run) + '/')}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    for statement in views(run, files):
        condition = (where or {}).get(_view(statement))
        _define(connection, f"{statement} WHERE {condition}" if condition else statement)
    return connection


def views(run: Path, files: str = "*.parquet") -> Iterator[str]:
    """The statements of manifests/views.sql, over the run wherever one stands."""
    text = (resources.files("manifests") / "views.sql").read_text(encoding="utf-8")
    place = str(run).replace("'", "''")
    for statement in re.sub(r"--[^\n]*", "", text).split(";"):
        if statement.strip():
            yield statement.strip().replace("*.parquet", files).replace("read_parquet('", f"read_parquet('{place}/")


def select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.DuckDBPyConnection:
    """Runs one reading statement.

    Raises:
        QueryError: it is none, or it fails.
    """
    with _users_errors():
        return connection.execute(_reading(connection, sql))


def rows(connection: duckdb.DuckDBPyConnection, sql: str, *, size: int = 2_000) -> Iterator[tuple[Any, ...]]:
    """The rows of a reading statement, `size` in memory at a time."""
    result = select(connection, sql)
    while batch := result.fetchmany(size):
        yield from batch


@cache
def names_in(expression: str, *, clause: str) -> frozenset[str]:
    """The column names that an SQL expression mentions.

    Args:
        expression: SQL of a user's.
        clause: the statement that it is a part of, with {} for it.

    Raises:
        QueryError: it does not fit.
    """
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(QUIET)
        (text,) = connection.execute("SELECT json_serialize_sql(?)", [clause.format(expression)]).fetchone() or ("",)
        volatile = {name for (name,) in connection.execute(VOLATILE).fetchall()}
    tree = json.loads(text)
    if wrong := _why_no_expression(tree, volatile):
        raise QueryError(f"{expression!r} is no SQL that fits here: {wrong}")
    return frozenset(_found("column_names", tree))


def _why_no_expression(tree: Any, volatile: set[str]) -> str:
    """Equal rows give equal verdicts: an expression looks at nothing but its row, and draws no lots."""
    if tree["error"]:
        return str(tree["error_message"])
    if len(tree["statements"]) != 1:
        return "more than one statement"
    node = tree["statements"][0]["node"]
    modifiers = {modifier["type"] for modifier in node.get("modifiers", [])}
    if len(node.get("select_list", [])) != 1 or node["from_table"]["type"] != "EMPTY" or modifiers - {"ORDER_MODIFIER"}:
        return "more than one expression"
    if "SUBQUERY" in _found("class", tree):
        return "it has a query inside"
    changing = sorted(volatile & set(_found("function_name", tree)))
    return f"{changing[0]} gives another answer at another time" if changing else ""


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _reading(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    import duckdb

    statements = connection.extract_statements(sql)
    if [s.type for s in statements] not in ([duckdb.StatementType.SELECT], [duckdb.StatementType.EXPLAIN]):
        raise QueryError("only one reading statement is allowed: SELECT, FROM, DESCRIBE, SUMMARIZE, EXPLAIN")
    return statements[0]


@contextmanager
def _users_errors() -> Iterator[None]:
    """What DuckDB says against a statement is its author's error; that a file cannot be opened is the machine's."""
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        if "No files found" in str(error):
            raise QueryError(str(error)) from error
        raise MachineError(str(error)) from error
    except duckdb.Error as error:
        raise QueryError(str(error)) from error


def _found(key: str, node: Any) -> Iterator[str]:
    """The values of a key anywhere in a parsed statement; of a list, the first."""
    if isinstance(node, dict):
        if key in node:
            yield node[key][0] if isinstance(node[key], list) else node[key]
        for value in node.values():
            yield from _found(key, value)
    elif isinstance(node, list):
        for value in node:
            yield from _found(key, value)


def _define(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    """Creates a view; an empty one with the right columns while the run has no such table."""
    import duckdb

    try:
        connection.execute(statement)
    except duckdb.IOException as error:
        if "No files found" not in str(error):
            raise
        name = _view(statement)
        record = next(r for r in RECORDS if r.table == name)
        nothing = ", ".join(f"NULL::{_sql_type(field.type)} AS {identifier(field.name)}" for field in schema(record))
        connection.execute(f"CREATE VIEW {name} AS SELECT {nothing} WHERE false")


def _view(statement: str) -> str:
    """What a CREATE VIEW creates."""
    return re.split(r"\W+", statement)[2]


def _sql_type(type: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_list(type):
        return f"{_sql_type(type.value_type)}[]"
    if pa.types.is_struct(type):
        return f"STRUCT({', '.join(f'{identifier(field.name)} {_sql_type(field.type)}' for field in type)})"
    return {"string": "VARCHAR", "int64": "BIGINT", "double": "DOUBLE", "bool": "BOOLEAN"}[str(type)]


def literal(text: str) -> str:
    """Text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def named_queries() -> list[tuple[str, str]]:
    """The named queries, each with the sentence it begins with."""
    files = sorted((resources.files("manifests") / "queries").iterdir(), key=lambda file: file.name)
    return [(file.name.removesuffix(".sql"), file.read_text().splitlines()[0].removeprefix("-- ")) for file in files]


def named_query(name: str) -> str:
    """The SQL of a named query.

    Raises:
        UnknownName: there is none of that name.
    """
    names = [known for known, _ in named_queries()]
    if name not in names:
        raise UnknownName(f"query {plugins.unknown(name, names)}")
    return (resources.files("manifests") / "queries" / f"{name}.sql").read_text(encoding="utf-8")


def show(connection: duckdb.DuckDBPyConnection, sql: str, format: str, out: IO[bytes]) -> None:
    """Prints what a reading statement gives: a table for people, csv, json (a list of objects) or parquet.

    Raises:
        QueryError: it is no reading statement, or it fails.
    """
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _users_errors(), pa.BufferOutputStream() as buffer:
            pq.write_table(connection.sql(_reading(connection, sql)).to_arrow_table(), buffer)
            out.write(buffer.getvalue())
        return
    result = select(connection, sql)
    names = [column[0] for column in result.description or ()]
    text = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    PRINTERS[format](names, result.fetchall(), text)
    text.detach()


def _as_table(names: list[str], rows: list[tuple[Any, ...]], out: IO[str]) -> None:
    cells = [names, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def _as_csv(names: list[str], rows: list[tuple[Any, ...]], out: IO[str]) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)


def _as_json(names: list[str], rows: list[tuple[Any, ...]], out: IO[str]) -> None:
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    print(json.dumps(objects, indent=2, ensure_ascii=False, default=str), file=out)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


PRINTERS = {"table": _as_table, "csv": _as_csv, "json": _as_json}
