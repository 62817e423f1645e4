"""Stored answers of the named queries: `recap compact` makes them, `recap query` reads them while no table has changed.

An answer is kept with a digest of all that decides it: the query, the views, the passes of run.toml, and the names,
times and sizes of the tables that it reads. Without a current one, the query runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.commands.sql import list_queries, print_parquet, print_query, print_rows, read_query
from pipeline.sections import Run
from pipeline.storage import database
from pipeline.storage.compaction import COMPACT
from pipeline.storage.tables import open_atomic

if TYPE_CHECKING:
    import pyarrow as pa

STATE_KEY = b"recap.state"  # in the Parquet footer of an answer: the digest


def print_named_query(run: Run, name: str, format: str, out: IO[bytes]) -> None:
    """Prints the answer of a named query, the stored one if it is current.

    Raises:
        UnknownNameError: there is no such query.
    """
    sql, file = read_query(name), _answer_file(run, name)
    with database.connect_run(run) as connection:
        answer = _read_answer(file, connection, run, sql) if file.exists() else None
        if answer is None:
            print_query(connection, sql, format, out)
        elif format == "parquet":
            print_parquet(answer, out)
        else:
            print_rows(answer.column_names, _list_rows(answer), format, out)


def store_answers(run: Run) -> Iterator[str]:
    """Answers the named queries whose stored answer is missing or outdated; yields their names."""
    import pyarrow.parquet as pq

    for name, _ in list_queries():
        sql, file = read_query(name), _answer_file(run, name)
        with database.connect_run(run) as connection:
            if _read_answer(file, connection, run, sql) is not None:
                continue
            state = _digest_state(connection, run, sql)
            answer = database.read_arrow(connection, sql)
        with open_atomic(file) as out:
            pq.write_table(answer.replace_schema_metadata({STATE_KEY: state}), out, write_page_checksum=True)
        yield name


def _answer_file(run: Run, name: str) -> Path:
    return run.folder / COMPACT / "answers" / f"{name}.parquet"


def _read_answer(file: Path, connection: database.Connection, run: Run, sql: str) -> pa.Table | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        answer = pq.read_table(file, page_checksum_verification=True)
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None
    state = (answer.schema.metadata or {}).get(STATE_KEY, b"").decode()
    return answer.replace_schema_metadata(None) if state == _digest_state(connection, run, sql) else None


def _digest_state(connection: database.Connection, run: Run, sql: str) -> str:
    import duckdb

    decided = [duckdb.__version__, sql, *database.describe_views(connection, run.folder, sql)]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()


def _list_rows(answer: pa.Table) -> Iterator[tuple[Any, ...]]:
    """The rows as DuckDB gives them: Arrow has its largest integers as decimals without a fraction."""
    for row in answer.to_pylist():
        yield tuple(_convert(value) for value in row.values())


def _convert(value: Any) -> Any:
    is_whole = isinstance(value, Decimal) and value.as_tuple().exponent == 0
    return int(value) if is_whole else value
