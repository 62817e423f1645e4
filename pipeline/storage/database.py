"""Decides how a run is asked in SQL: DuckDB over its Parquet files, read-only, seeing nothing outside the run."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline import plugins
from pipeline.errors import MachineError, QueryError, UnknownNameError
from pipeline.records import (
    Caption,
    Exported,
    Image,
    ImageRubric,
    Planned,
    Record,
    Score,
    Stat,
    Step,
    Verdict,
    arrow_schema,
)

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

RECORDS: tuple[type[Record], ...] = (Planned, Image, Caption, ImageRubric, Score, Verdict, Step, Stat, Exported)
VOLATILE = "SELECT function_name FROM duckdb_functions() WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')"
QUIET = "SET enable_progress_bar = false"  # it would go to standard output, which is data
MAX_CELL = 100  # characters of a value in a table for people
QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}  # all of DuckDB's that only read
READING = "SELECT, FROM, DESCRIBE, SUMMARIZE, or EXPLAIN [ANALYZE] of one"
EXPLAIN = re.compile(r"^EXPLAIN\b\s*(ANALYZE\b|\(\s*(ANALYZE|FORMAT)\b[\w\s,']*\))?", re.IGNORECASE)
READERS = re.compile(  # none that reads the rows of a view by a text: the view would not be defined
    r"(read|parquet|duckdb|pragma)_\w+|generate_series|glob|json_(each|tree)|range|repeat(_row)?|sniff_csv|unnest"
)


class Connection:
    """DuckDB with the views of one run. A view is defined when a statement names it: no other's files are looked at.

    Until then, and while the run has no such table, it stands there empty, with the right columns.
    """

    def __init__(self, duck: duckdb.DuckDBPyConnection, views: Iterable[str]) -> None:
        self.duck = duck
        self._undefined = {_view(statement): statement for statement in views}
        for record in RECORDS:
            nothing = ", ".join(
                f"NULL::{_sql_type(field.type)} AS {quote_identifier(field.name)}" for field in arrow_schema(record)
            )
            duck.execute(f"CREATE VIEW {record.table} AS SELECT {nothing} WHERE false")

    def define(self, names: Iterable[str]) -> None:
        """
        Raises:
            MachineError: a file of one of these views does not read.
        """
        import duckdb

        for name in self._undefined.keys() & names:
            try:
                self.duck.execute(self._undefined[name].replace("CREATE", "CREATE OR REPLACE", 1))
            except duckdb.Error as error:
                why = str(error).partition("\n")[0]  # the rest shows a statement that is not the user's
                if "No files found" not in why:
                    remedy = "`recap run` makes a broken table again, and a file of stats/ may be removed"
                    raise MachineError(f"a file of {name} does not read: {why}; {remedy}") from error
            del self._undefined[name]

    def close(self) -> None:
        self.duck.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(folder: Path, *, files: str = "*.parquet", where: Mapping[str, str] | None = None) -> Connection:
    """A connection with the views of manifests/views.sql over one run, locked into it.

    Args:
        folder: the run.
        files: which table files the views see; one shard's when it is `00007.parquet`.
        where: view -> the condition for those of its rows that are shown.
    """
    import duckdb

    run = folder.absolute()
    duck = duckdb.connect(config={} if files == "*.parquet" else {"threads": 2})
    duck.execute(QUIET)
    duck.execute(f"SET allowed_directories = [{quote_literal(str(run) + '/')}]")
    duck.execute("SET enable_external_access = false")
    duck.execute("SET lock_configuration = true")
    return Connection(duck, _views(run, files, where or {}))


def _views(run: Path, files: str, where: Mapping[str, str]) -> Iterator[str]:
    """The statements of manifests/views.sql, over the run wherever one stands."""
    text = (resources.files("manifests") / "views.sql").read_text(encoding="utf-8")
    place = str(run).replace("'", "''")
    for statement in filter(None, map(str.strip, re.sub(r"--[^\n]*", "", text).split(";"))):
        condition = where.get(_view(statement))
        placed = statement.replace("*.parquet", files).replace("read_parquet('", f"read_parquet('{place}/")
        yield f"{placed} WHERE {condition}" if condition else placed


def run_query(connection: Connection, sql: str) -> duckdb.DuckDBPyConnection:
    """Runs one reading statement.

    Raises:
        QueryError: it is none, or it fails.
        MachineError: a file that it reads does not read.
    """
    with _users_errors():
        return connection.duck.execute(_reading(connection, sql))


def query_rows(connection: Connection, sql: str, *, size: int = 2_000) -> Iterator[tuple[Any, ...]]:
    """The rows of a reading statement, `size` in memory at a time."""
    yield from _fetched(run_query(connection, sql), size)


def _fetched(result: duckdb.DuckDBPyConnection, size: int = 2_000) -> Iterator[tuple[Any, ...]]:
    while True:
        with _users_errors():
            batch = result.fetchmany(size)
        if not batch:
            return
        yield from batch


@cache
def find_columns(expression: str, *, clause: str) -> frozenset[str]:
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
        tree = _tree(connection, clause.format(expression))
        volatile = {name for (name,) in connection.execute(VOLATILE).fetchall()}
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


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _reading(connection: Connection, sql: str) -> duckdb.Statement:
    """The one statement of `sql`, whose views are defined now.

    Looked at is what it says, not its type: what DuckDB takes for a SELECT copies in a WITH clause, or runs a text.

    Raises:
        QueryError: it could do more than read.
    """
    statements = connection.duck.extract_statements(sql)
    tree = _tree(connection.duck, EXPLAIN.sub("", statements[0].query)) if len(statements) == 1 else {"error": True}
    nodes = list(_nodes(tree))
    kinds = {kind for node in nodes if isinstance(kind := node.get("type"), str) and kind.endswith("_NODE")}
    if tree["error"] or not tree["statements"] or kinds - QUERIES:
        raise QueryError(f"only one reading statement is allowed: {READING}")
    functions = {node["function"]["function_name"].lower() for node in nodes if node.get("type") == "TABLE_FUNCTION"}
    if unknown := sorted(name for name in functions if not READERS.fullmatch(name)):
        raise QueryError(f"FROM {unknown[0]}(...) is not allowed: it is none of those known to do no more than read")
    connection.define({node["table_name"].strip('"').lower() for node in nodes if "table_name" in node})
    return statements[0]


def _tree(duck: duckdb.DuckDBPyConnection, sql: str) -> Any:
    """SELECT statements as DuckDB parses them: {"error": false, "statements": [...]}.

    Raises:
        QueryError: it is nested too deeply.
    """
    (text,) = duck.execute("SELECT json_serialize_sql(?)", [sql]).fetchone() or ("",)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise QueryError(f"{sql[:MAX_CELL]}... is nested too deeply") from error


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


def _found(key: str, tree: Any) -> Iterator[str]:
    """The values of a key anywhere in a parsed statement; of a list, the first."""
    for node in _nodes(tree):
        if key in node:
            yield node[key][0] if isinstance(node[key], list) else node[key]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All that has parts in a parsed statement."""
    left = [tree]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left += part.values()
        elif isinstance(part, list):
            left += part


def _view(statement: str) -> str:
    """What a CREATE VIEW creates."""
    return re.split(r"\W+", statement)[2]


def _sql_type(type: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_list(type):
        return f"{_sql_type(type.value_type)}[]"
    if pa.types.is_struct(type):
        return f"STRUCT({', '.join(f'{quote_identifier(field.name)} {_sql_type(field.type)}' for field in type)})"
    return {"string": "VARCHAR", "int64": "BIGINT", "double": "DOUBLE", "bool": "BOOLEAN"}[str(type)]


def quote_literal(text: str) -> str:
    """Text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def list_queries() -> list[tuple[str, str]]:
    """The named queries, each with the sentence it begins with."""
    files = sorted((resources.files("manifests") / "queries").iterdir(), key=lambda file: file.name)
    return [(file.name.removesuffix(".sql"), file.read_text().splitlines()[0].removeprefix("-- ")) for file in files]


def read_query(name: str) -> str:
    """The SQL of a named query.

    Raises:
        UnknownNameError: there is none of that name.
    """
    names = [known for known, _ in list_queries()]
    if name not in names:
        raise UnknownNameError(f"query {plugins.explain_unknown(name, names)}")
    return (resources.files("manifests") / "queries" / f"{name}.sql").read_text(encoding="utf-8")


def print_query(connection: Connection, sql: str, format: str, out: IO[bytes]) -> None:
    """Prints what a reading statement gives: a table for people, csv, json (a list of objects) or parquet.

    Raises:
        QueryError: it is no reading statement, or it fails.
    """
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _users_errors(), pa.BufferOutputStream() as buffer:
            pq.write_table(connection.duck.sql(_reading(connection, sql)).to_arrow_table(), buffer)
            out.write(buffer.getvalue())
        return
    result = run_query(connection, sql)
    names = [column[0] for column in result.description or ()]
    text = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    try:
        PRINTERS[format](names, _fetched(result), text)
    finally:
        text.detach()


def _as_table(names: list[str], query_rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    cells = [names, *([_cell(value) for value in row] for row in query_rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def _as_csv(names: list[str], query_rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(query_rows)


def _as_json(names: list[str], query_rows: Iterable[tuple[Any, ...]], out: IO[str]) -> None:
    before = "[\n"
    for row in query_rows:
        one = {name: _finite(value) for name, value in zip(names, row, strict=True)}
        text = json.dumps(one, indent=2, ensure_ascii=False, default=str, allow_nan=False)
        out.write(before + "  " + text.replace("\n", "\n  "))  # textwrap would break lines within strings
        before = ",\n"
    out.write("[]\n" if before == "[\n" else "\n]\n")


def _finite(value: Any) -> Any:
    """The same with None for each infinity and each NaN, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


PRINTERS = {"table": _as_table, "csv": _as_csv, "json": _as_json}
