"""Decides what SQL in run.toml may mention: columns of captions and images, and scores, each by its section's name.

It does not know what follows from a condition.
"""

from __future__ import annotations

from pipeline.errors import ConfigError, QueryError
from pipeline.records import Caption, Image, column_names
from pipeline.sections import Run
from pipeline.storage import database

CONDITION, ORDER_BY = "SELECT {}", "SELECT 1 ORDER BY {}"  # where a user's SQL stands


def find_scores(run: Run, field: str, sql: str, *, clause: str = CONDITION) -> set[str]:
    """The score passes that an SQL condition of run.toml mentions, beside columns of image and caption.

    Raises:
        ConfigError: it is no SQL, or mentions a column that there is not.
    """
    try:
        names = database.find_columns(sql, clause=clause)
    except QueryError as error:
        raise ConfigError(f"{run.file}: {field}", str(error)) from error
    taken = {*column_names(Caption), *column_names(Image), "caption", "num_words"}
    for score in run.sections["score"]:
        if score in taken:
            raise ConfigError(f"{run.file}: score.{score}", f"{score} is a column in SQL already; choose another name")
    known = {*run.sections["score"], *taken}
    if unknown := sorted(names - known):
        message = f"{sql!r} mentions {', '.join(unknown)}; the columns are {', '.join(sorted(known))}"
        raise ConfigError(f"{run.file}: {field}", message)
    return set(names & set(run.sections["score"]))


def check_query(run: Run, field: str, query: str) -> None:
    """Finds wrong types and functions before any shard is begun: the query is planned over empty tables.

    Raises:
        ConfigError: it cannot be planned.
    """
    with database.connect(run.folder, files="none.parquet") as connection:
        try:
            database.run_query(connection, f"EXPLAIN {query}")
        except QueryError as error:
            raise ConfigError(f"{run.file}: {field}", str(error)) from error
