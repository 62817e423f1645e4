"""Read-only SQL over the Parquet files of a run, with DuckDB. A query sees nothing outside the run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import machine
from pipeline.errors import MachineError, QueryError
from pipeline.records import (
    Canary,
    Caption,
    Curation,
    Exported,
    Finding,
    FoundRow,
    ImageRubric,
    Label,
    MeasuredImage,
    Planned,
    Record,
    Score,
    Stat,
    Step,
    Verdict,
    arrow_schema,
)
from pipeline.sections import Run
from pipeline.storage import expressions, functions
from pipeline.storage.compaction import list_current_files
from pipeline.storage.words import MACRO, read_macro

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

RECORDS: tuple[type[Record], ...] = (
    *(Planned, MeasuredImage, Curation, Finding, FoundRow, Caption, ImageRubric, Score, Canary, Verdict, Label),
    *(Step, Stat, Exported),
)
STAGES_OF_FOLDERS = {"finding": "find"}  # first folder -> stage, where their names differ
ADDED_COLUMNS = {"caption": ", name AS caption"}  # of the views, to those of the files
QUIET = "SET enable_progress_bar = false"  # the bar goes to standard output, which is data
ROWS_IN_MEMORY = 2_000  # of a query's result
MAX_QUOTED = 100  # characters of a statement in an error
QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}  # DuckDB's, which only read
ALLOWED = "SELECT, FROM, DESCRIBE, SUMMARIZE, or EXPLAIN [ANALYZE] of one"
EXPLAIN = re.compile(r"^EXPLAIN\b\s*(ANALYZE\b|\(\s*(ANALYZE|FORMAT)\b[\w\s,']*\))?", re.IGNORECASE)
GLOB = re.compile(r"read_parquet\('(?P<root>/proc/self/fd/\d+)/(?P<pattern>[^']*/\*\.parquet)'")
HANDLE = re.compile(r"/proc/self/fd/\d+/")  # of a run's folder, in the paths that DuckDB reads
TABLE_FUNCTIONS = re.compile(  # except those that take a view's name as text: the view would not be defined
    r"(read|parquet|duckdb|pragma)_\w+|generate_series|glob|json_(each|tree)|range|repeat(_row)?|sniff_csv|unnest"
)


class Connection:
    """A DuckDB connection with the views of one run.

    A view is defined when a statement names it, so that no other view's files are opened. Until then, and while the
    run has no such table, it is empty, with the right columns.
    """

    def __init__(self, duck: duckdb.DuckDBPyConnection, views: Iterable[str], *, handle: int) -> None:
        """`handle` is that of the run's folder, through which the views read."""
        self.duck, self._handle = duck, handle
        self.views = {_view_name(statement): statement for statement in views}
        self._undefined, self._without_rows = dict(self.views), {record.table: record for record in RECORDS}
        self._has_functions = False

    def define_functions(self, names: Set[str]) -> None:
        """Defines the functions for sentences if they are among these names, and not defined yet."""
        if not self._has_functions and names & functions.NAMES:
            functions.define_functions(self.duck)
            self._has_functions = True

    def define(self, names: Set[str]) -> None:
        """Defines these views, if they are not defined yet; all of them without rows if a name is not a view's.

        That may be the name of another table, or a mistake, for which DuckDB suggests names that are like it.

        Raises:
            MachineError: a file of one of them cannot be read.
        """
        import duckdb

        is_known = names <= self.views.keys()
        for name in [one for one in self._without_rows if one in names or not is_known]:
            columns = ", ".join(map(_empty_column, arrow_schema(self._without_rows.pop(name))))
            more = ADDED_COLUMNS.get(name, "")
            self.duck.execute(f"CREATE VIEW {name} AS SELECT *{more} FROM (SELECT {columns} WHERE false)")
        for name in self._undefined.keys() & names:
            try:
                self._define(name, self._undefined[name].replace("CREATE", "CREATE OR REPLACE", 1))
            except duckdb.Error as error:
                if trouble := machine.find_trouble(error):
                    raise trouble from error
                why = _format_error(error).partition("\n")[0]  # the rest shows our statement, not the user's
                if "No files found" not in why:
                    remedy = "`recap run` makes a broken table again, and a file of stats/ may be removed"
                    raise MachineError(f"a file of {name} cannot be read: {why}; {remedy}") from error
            del self._undefined[name]

    def _define(self, name: str, statement: str) -> None:
        """Runs a CREATE statement; adds, as NULL, the columns of its record that none of the files has yet."""
        statement = GLOB.sub(self._use_copies, statement)
        self.duck.execute(statement)
        stored = {row[0] for row in self.duck.execute(f"DESCRIBE {name}").fetchall()}
        (record,) = (record for record in RECORDS if record.table == name)
        missing = "".join(f", {_empty_column(field)}" for field in arrow_schema(record) if field.name not in stored)
        if missing:
            self.duck.execute(statement.replace("*", f"*{missing}", 1))

    def _use_copies(self, glob: re.Match[str]) -> str:
        """The files of a view as DuckDB's list, with compacted copies where there are current ones."""
        files = list_current_files(Path(glob["root"]), glob["pattern"])
        listed = ", ".join(quote_literal(f"{glob['root']}/{file}") for file in files)
        return f"read_parquet([{listed}]" if files else glob[0]

    def close(self) -> None:
        """Idempotent."""
        self.duck.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    folder: Path, *, files: str = "*.parquet", where: Mapping[str, str] | None = None, threads: int = 2
) -> Connection:
    """Opens the views of manifests/views.sql over one run, with access to nothing else.

    Args:
        folder: the run.
        files: the table files that the views see; `00007.parquet` for those of one shard.
        where: view -> SQL condition that its rows must meet.
        threads: for the files of one shard; with one, rows come in the same order each time.
    """
    import duckdb

    duck = duckdb.connect(config={} if files == "*.parquet" else {"threads": threads})
    # DuckDB reads *, [ and \ in any part of a path as a pattern. Through a handle the run's own path is not part of it.
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    root = f"/proc/self/fd/{handle}"
    allowed = ", ".join(quote_literal(f"{path}/") for path in (root, folder.absolute()))
    duck.execute(QUIET)
    duck.execute(f"SET allowed_directories = [{allowed}]")
    duck.execute("SET enable_external_access = false")
    duck.execute("SET lock_configuration = true")
    duck.execute(read_macro())
    return Connection(duck, _read_views(root, files, where or {}), handle=handle)


def connect_run(run: Run, *, files: str = "*.parquet", threads: int = 2) -> Connection:
    """As `connect`, without the tables of passes that run.toml no longer has."""
    folders = list(_list_named_folders(run))
    known, passes = (
        f"IN ({', '.join(map(quote_literal, names)) or 'NULL'})" for names in (folders, map(_name_pass, folders))
    )
    where = {name: f"'{name}/' || name {known}" for name in ("finding", "caption", "rubric")}
    where["found"] = where["finding"]
    where |= {name: f"'{name}/' || name || '/' || caption {known}" for name in ("score", "canary")}
    where["stats"] = f"name = '' OR concat_ws('/', stage, name, nullif(caption, '')) {passes}"
    return connect(run.folder, files=files, where=where, threads=threads)


def find_leftovers(run: Run) -> list[str]:
    """The folders of tables whose pass was removed from run.toml or renamed."""
    patterns = ("finding/*", "caption/*", "rubric/*", "score/*/*", "canary/*/*")
    paths = {path for pattern in patterns for path in run.folder.glob(pattern)}
    return sorted({str(path.relative_to(run.folder)) for path in paths if path.is_dir()} - {*_list_named_folders(run)})


def list_score_folders(run: Run, scores: Iterable[str], *, captions: Iterable[str] | None = None) -> Iterator[str]:
    """The folders of these score passes' tables: one for each caption pass that is scored, of `captions` if given."""
    wanted = set(run.sections["caption"] if captions is None else captions)
    for score in sorted(scores):
        for caption in run.sections["score"][score].captions or run.sections["caption"]:
            if caption in wanted:
                yield f"score/{score}/{caption}"


def _list_named_folders(run: Run) -> Iterator[str]:
    yield from (f"finding/{name}" for name in run.sections["find"])
    yield from (f"{stage}/{name}" for stage in ("caption", "rubric") for name in run.sections[stage])
    scored = list(list_score_folders(run, run.sections["score"]))
    yield from scored
    if run.sections["canary"]:
        yield from (f"canary/{folder.removeprefix('score/')}" for folder in scored)


def _name_pass(folder: str) -> str:
    """The folder's pass: its stage, name and caption pass, between slashes."""
    first, _, names = folder.partition("/")
    return f"{STAGES_OF_FOLDERS.get(first, first)}/{names}"


def _read_views(folder: str, files: str, where: Mapping[str, str]) -> Iterator[str]:
    """The statements of manifests/views.sql with paths below `folder`, which means nothing to DuckDB."""
    text = (resources.files("manifests") / "views.sql").read_text(encoding="utf-8")
    for statement in filter(None, map(str.strip, re.sub(r"--[^\n]*", "", MACRO.sub("", text)).split(";"))):
        condition = where.get(_view_name(statement))
        absolute = statement.replace("*.parquet", files).replace("read_parquet('", f"read_parquet('{folder}/")
        yield f"{absolute} WHERE {condition}" if condition else absolute


def run_query(connection: Connection, sql: str) -> duckdb.DuckDBPyConnection:
    """Runs one statement that only reads.

    Raises:
        QueryError: it could do more than read, or it fails.
        MachineError: a file that it reads cannot be read, or there is too little memory.
    """
    with _translate_errors():
        return connection.duck.execute(_check_statement(connection, sql))


def query_rows(connection: Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """As `run_query`, and fetches the rows, a few in memory at a time."""
    yield from fetch_rows(run_query(connection, sql))


def read_arrow(connection: Connection, sql: str) -> pa.Table:
    """As `run_query`, and reads all rows into memory."""
    with _translate_errors():
        return connection.duck.sql(_check_statement(connection, sql)).to_arrow_table()


def fetch_rows(result: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while True:
        with _translate_errors():
            batch = result.fetchmany(ROWS_IN_MEMORY)
        if not batch:
            return
        yield from batch


@cache
def find_columns(expression: str, *, clause: str, kind: str = "") -> frozenset[str]:
    """The column names in an SQL expression of the user's.

    Args:
        expression: the SQL.
        clause: the statement that it becomes a part of, with {} where it goes.
        kind: what it is, for errors; default: condition or order.

    Raises:
        QueryError: it is not one expression whose value depends only on its row.
    """
    return frozenset(path[0] for path in find_column_paths(expression, clause=clause, kind=kind))


@cache
def find_column_paths(expression: str, *, clause: str, kind: str = "") -> frozenset[tuple[str, ...]]:
    """As `find_columns`, with the fields that follow a name after dots: ("signs", "text") for `signs.text`.

    Raises:
        QueryError: as `find_columns`.
    """
    tree = _parse_expression(expression, clause, kind)
    return frozenset(tuple(node["column_names"]) for node in _walk(tree) if "column_names" in node)


@cache
def find_members(expression: str, *, clause: str) -> frozenset[tuple[tuple[str, ...], str]]:
    """The texts that an SQL expression of the user's looks for in lists, each after the list's path:
    (("signs", "labels"), "stop") for `list_contains(signs.labels, 'stop')`.

    Raises:
        QueryError: as `find_columns`.
    """
    return frozenset(expressions.list_members(_walk(_parse_expression(expression, clause, ""))))


def _parse_expression(expression: str, clause: str, kind: str) -> Any:
    with _open_parser().cursor() as connection:
        tree = _parse_statements(connection, clause.format(expression))
    if problem := _find_problem(tree):
        kind = kind or ("order" if "ORDER BY" in clause else "condition")
        raise QueryError(f"{expression!r} is not a valid SQL {kind}: {problem}")
    return tree


def find_rest(expression: str) -> str:
    """A semicolon, or a comment at the end, which would hide what follows the expression in a statement; "" without."""
    import duckdb

    tokens = duckdb.tokenize(expression)
    ends = [at for at, kind in tokens if kind == duckdb.token_type.comment or expression[at] == ";"]
    return expression[ends[0] :] if ends else ""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The names in a SELECT, in lower case."""

    tables: Mapping[str, frozenset[str]]  # that it reads -> the columns that may be theirs
    common: frozenset[str]  # of its WITH clauses, which are no tables


@cache
def find_sources(sql: str) -> Sources:
    """The names of what a SELECT of the user's reads.

    Raises:
        QueryError: it is not one SELECT whose rows depend only on the tables that it names.
    """
    with _open_parser().cursor() as connection:
        tree = _parse_statements(connection, sql)
    nodes = list(_walk(tree))
    problem = str(tree["error_message"]) if tree["error"] else ""
    if not problem and len(tree["statements"]) != 1:
        problem = "more than one statement"
    if problem := problem or expressions.find_query_problem(nodes):
        raise QueryError(f"{sql!r} is not a valid SELECT: {problem}")
    common, tables = _list_common_names(nodes), dict[str, frozenset[str]]()
    for select, table in _list_readers(tree["statements"][0]):
        if table not in common:
            tables[table] = tables.get(table, frozenset()) | _list_columns(select, tree)
    return Sources(tables=tables, common=frozenset(common))


def _list_readers(tree: Any) -> Iterator[tuple[Any, str]]:
    """Each table that is read, with the innermost SELECT that reads it."""
    stack = [(tree, tree)]
    while stack:
        part, select = stack.pop()
        if isinstance(part, dict):
            select = part if part.get("type") == "SELECT_NODE" else select
            yield from ((select, name) for name in _list_tables([part]) - {""})
            stack += [(value, select) for value in part.values()]
        elif isinstance(part, list):
            stack += [(value, select) for value in part]


def _list_columns(select: Any, whole: Any) -> frozenset[str]:
    """The columns that a SELECT names; with a star, the whole statement may name more of what it reads."""
    has_star = any(node.get("class") == "STAR" for node in _walk(select))
    nodes = _walk(whole if has_star else select)
    return frozenset(str(name).lower() for node in nodes for name in node.get("column_names") or ())


@cache
def _open_parser() -> duckdb.DuckDBPyConnection:
    """An empty database, since DuckDB parses only within one; opening it takes tens of milliseconds."""
    import duckdb

    connection = duckdb.connect(config={"threads": 1})
    connection.execute(QUIET)
    return connection


def _find_problem(tree: Any) -> str:
    """The reason why a parsed clause is not one deterministic expression over a row; "" if it is."""
    if tree["error"]:
        return str(tree["error_message"])
    if len(tree["statements"]) != 1:
        return "more than one statement"
    node = tree["statements"][0]["node"]
    modifiers = {modifier["type"] for modifier in node.get("modifiers", [])}
    if len(node.get("select_list", [])) != 1 or node["from_table"]["type"] != "EMPTY" or modifiers - {"ORDER_MODIFIER"}:
        return "more than one expression"
    return expressions.find_problem(_walk(tree))


def _check_statement(connection: Connection, sql: str) -> duckdb.Statement:
    """The one statement of `sql`, with its views defined.

    The parse tree is checked, not DuckDB's statement type: a SELECT may copy within a WITH clause, or run text as SQL.

    Raises:
        QueryError: it could do more than read.
    """
    statements = connection.duck.extract_statements(sql)
    only = EXPLAIN.sub("", statements[0].query) if len(statements) == 1 else ""
    tree = _parse_statements(connection.duck, only) if only else {"error": True}
    nodes = list(_walk(tree))
    kinds = {kind for node in nodes if isinstance(kind := node.get("type"), str) and kind.endswith("_NODE")}
    if tree["error"] or not tree["statements"] or kinds - QUERY_NODES:
        raise QueryError(f"only one reading statement is allowed: {ALLOWED}")
    readers = {node["function"]["function_name"].lower() for node in nodes if node.get("type") == "TABLE_FUNCTION"}
    if unknown := sorted(name for name in readers if not TABLE_FUNCTIONS.fullmatch(name)):
        raise QueryError(f"FROM {unknown[0]}(...) is not allowed: it is none of those known to do no more than read")
    connection.define_functions({node["function_name"].lower() for node in nodes if "function_name" in node})
    common = _list_common_names(nodes)
    is_about_tables = any(name.startswith(("duckdb_", "pragma_")) for name in readers)
    connection.define((_list_tables(nodes) - common) | ({"*"} if is_about_tables else set()))
    return statements[0]


def _list_common_names(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names of WITH clauses."""
    return {entry["key"].lower() for node in nodes for entry in node.get("cte_map", {}).get("map", ())}


def _list_tables(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    return {node["table_name"].strip('"').lower() for node in nodes if "table_name" in node}


def describe_views(connection: Connection, run: Path, sql: str) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """The statement of each view that a query names, and the names, times and sizes of the files that it reads."""
    for name in sorted(_list_tables(_walk(_parse_statements(connection.duck, sql))) & connection.views.keys()):
        statement = HANDLE.sub("", connection.views[name])
        (pattern,) = re.findall(r"read_parquet\('([^']*)'", statement)
        folders = [path for path in run.glob(pattern.rpartition("/")[0]) if path.is_dir()] if "/" in pattern else [run]
        entries = [entry for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".parquet")]
        files = [(os.path.relpath(entry.path, run), entry.stat()) for entry in entries]
        yield statement, sorted((file, about.st_mtime_ns, about.st_size) for file, about in files)


def _parse_statements(duck: duckdb.DuckDBPyConnection, sql: str) -> Any:
    """SELECT statements as DuckDB parses them: {"error": false, "statements": [...]}.

    Raises:
        QueryError: they are nested too deeply.
    """
    ((text,),) = duck.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()  # a result left open blocks the next
    try:
        return json.loads(text)
    except RecursionError as error:
        raise QueryError(f"{sql[:MAX_QUOTED]}... is nested too deeply") from error


@contextmanager
def open_condition(condition: str) -> Iterator[Callable[[pa.Table], npt.NDArray[np.bool_]]]:
    """A function that finds which rows of an Arrow table meet an SQL condition; where it is NULL they do not.

    Raises:
        QueryError: the condition fails, or is none.
    """
    import duckdb

    with duckdb.connect(config={"threads": 1}) as duck, _translate_errors():
        duck.execute(QUIET)
        duck.execute("SET enable_external_access = false")

        def find_rows(table: pa.Table) -> npt.NDArray[np.bool_]:
            with _translate_errors():
                duck.register("image", table)
                found = duck.sql(f"SELECT coalesce(({condition})::BOOLEAN, false) AS met FROM image")
                met: npt.NDArray[np.bool_] = found.to_arrow_table().column("met").to_numpy()
                return met

        yield find_rows


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raises DuckDB's errors as a QueryError, or a MachineError where a file cannot be read or memory is short."""
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        if "No files found" in str(error):
            raise QueryError(_format_error(error)) from error
        raise MachineError(_format_error(error)) from error
    except duckdb.Error as error:
        if trouble := machine.find_trouble(error):
            raise trouble from error
        raise QueryError(_format_error(error)) from error


def _format_error(error: Exception) -> str:
    """DuckDB's message, with the files of the run relative to its folder."""
    return HANDLE.sub("", str(error))


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every node of a parse tree; iterative, because trees may be deeper than Python's stack."""
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            stack += part.values()
        elif isinstance(part, list):
            stack += part


def _view_name(statement: str) -> str:
    """The name that a CREATE VIEW statement defines."""
    return re.split(r"\W+", statement)[2]


def _empty_column(field: pa.Field) -> str:
    return f"NULL::{_sql_type(field.type)} AS {quote_identifier(field.name)}"


def _sql_type(type: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_list(type):
        return f"{_sql_type(type.value_type)}[]"
    if pa.types.is_struct(type):
        return f"STRUCT({', '.join(f'{quote_identifier(field.name)} {_sql_type(field.type)}' for field in type)})"
    return {"string": "VARCHAR", "int64": "BIGINT", "double": "DOUBLE", "bool": "BOOLEAN"}[str(type)]


def quote_literal(text: str) -> str:
    """Text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def quote_identifier(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
