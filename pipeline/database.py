"""Decides how a run is asked in SQL: DuckDB over its Parquet files, read-only, seeing nothing outside the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import QueryError
from pipeline.records import Caption, Exported, Image, Record, Score, Stat, Verdict, schema

if TYPE_CHECKING:
    import duckdb

RECORDS: tuple[type[Record], ...] = (Image, Caption, Score, Verdict, Stat, Exported)


def connect(folder: Path, *, files: str = "*.parquet") -> duckdb.DuckDBPyConnection:
    """A connection with the views of manifests/views.sql over one run, locked into it.

    Args:
        folder: the run.
        files: which table files the views see; one shard's when it is `00007.parquet`.
    """
    import duckdb

    run = folder.absolute()
    connection = duckdb.connect(config={"threads": 2 if files != "*.parquet" else 0} if files != "*.parquet" else {})
    connection.execute(f"SET allowed_directories = [{literal(str(run) + '/')}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    for statement in views(run, files):
        _define(connection, statement)
    return connection


def views(run: Path, files: str = "*.parquet") -> Iterator[str]:
    """The statements of manifests/views.sql, over the run wherever one stands."""
    text = (resources.files("manifests") / "views.sql").read_text(encoding="utf-8")
    text = text.replace("*.parquet", files).replace(
        "read_parquet('", f"read_parquet('{str(run).replace(chr(39), chr(39) * 2)}/"
    )
    for statement in re.sub(r"--[^\n]*", "", text).split(";"):
        if statement.strip():
            yield statement.strip()


def select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.DuckDBPyConnection:
    """Runs one reading statement.

    Raises:
        QueryError: it is none, or it fails.
    """
    import duckdb

    try:
        statements = connection.extract_statements(sql)
        if [s.type for s in statements] not in ([duckdb.StatementType.SELECT], [duckdb.StatementType.EXPLAIN]):
            raise QueryError("only one reading statement is allowed: SELECT, FROM, DESCRIBE, SUMMARIZE, EXPLAIN")
        return connection.execute(statements[0])
    except duckdb.Error as error:
        raise QueryError(str(error)) from error


def rows(connection: duckdb.DuckDBPyConnection, sql: str, *, size: int = 2_000) -> Iterator[tuple[Any, ...]]:
    """The rows of a reading statement, `size` in memory at a time."""
    result = select(connection, sql)
    while batch := result.fetchmany(size):
        yield from batch


def names_in(expression: str, *, clause: str) -> set[str]:
    """The column names that an SQL expression mentions.

    Args:
        expression: SQL of a user's.
        clause: the statement that it is a part of, with {} for it.

    Raises:
        QueryError: it does not fit.
    """
    import json

    import duckdb

    with duckdb.connect() as connection:
        (text,) = connection.execute("SELECT json_serialize_sql(?)", [clause.format(expression)]).fetchone() or ("",)
    tree = json.loads(text)
    if tree["error"] or len(tree["statements"]) != 1:
        raise QueryError(
            f"{expression!r} is no SQL that fits here: {tree.get('error_message', 'more than one statement')}"
        )
    return set(_columns(tree))


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _columns(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            yield node["column_names"][0]
        for value in node.values():
            yield from _columns(value)
    elif isinstance(node, list):
        for value in node:
            yield from _columns(value)


def _define(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    """Creates a view; an empty one with the right columns while the run has no such table."""
    import duckdb

    try:
        connection.execute(statement)
    except duckdb.IOException as error:
        if "No files found" not in str(error):
            raise
        name = re.split(r"\W+", statement)[2]
        record = next(r for r in RECORDS if r.table == name)
        connection.register(f"no_{name}", schema(record).empty_table())
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM no_{name}")


def literal(text: str) -> str:
    """Text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
