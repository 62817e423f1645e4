"""`recap compare`: two runs, or two passes of one, joined by the content of their images.

Of each image, each side gives its best caption: the chosen one, else a kept one, else the first that is complete. The
rows of both sides go through temporary files, so memory does not grow with the runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline import config
from pipeline.commands.sql import print_parquet, print_rows
from pipeline.errors import UserError
from pipeline.storage import database
from pipeline.storage.tables import split_batches

if TYPE_CHECKING:
    import duckdb

ROWS_AT_ONCE = 10_000
CAPTION_COLUMNS = {
    **dict.fromkeys(("sha256", "source_key"), "string"),
    "kept": "bool",
    "num_captions": "int64",
    "text": "string",
    "num_words": "int64",
}
SCORE_COLUMNS = {"sha256": "string", "name": "string", "value": "float64"}

BEST = """
    WITH ranked AS (
        SELECT i.sha256, i.source_key, c.key, c.name, c.candidate, c.text, coalesce(v.keep, false) AS keep,
            (coalesce(v.chosen, false), coalesce(v.keep, false), c.status = 'ok', -c.candidate, c.name, i.key) AS rank
        FROM image AS i
        JOIN caption AS c ON c.key = i.key
        LEFT JOIN verdict AS v ON v.key = c.key AND v.caption = c.name AND v.candidate = c.candidate
        WHERE i.status = 'ok' AND {condition}
    ), best AS (
        SELECT sha256, bool_or(keep) AS kept, count(*) AS num_captions, arg_max(ranked, rank) AS c
        FROM ranked GROUP BY sha256
    )"""
CAPTIONS = """
    SELECT sha256, c.source_key, kept, num_captions, c.text, count_words(c.text) AS num_words FROM best"""
SCORES = """
    SELECT sha256, s.name, s.value FROM best
    JOIN score AS s ON s.key = c.key AND s.caption = c.name AND s.candidate = c.candidate WHERE s.value IS NOT NULL"""
COUNTS = """
    SELECT 'images', (SELECT count(*) FROM a)::DOUBLE, (SELECT count(*) FROM b)::DOUBLE, NULL
    UNION ALL SELECT 'kept', (SELECT count(*) FROM a WHERE kept), (SELECT count(*) FROM b WHERE kept), NULL
    UNION ALL SELECT 'share kept', (SELECT avg(kept::INT) FROM a), (SELECT avg(kept::INT) FROM b), NULL
    UNION ALL SELECT 'kept, in both', sum(a.kept::INT), sum(b.kept::INT), count(*) FROM a JOIN b USING (sha256)
    UNION ALL SELECT 'words', avg(a.num_words), avg(b.num_words), count(*) FROM a JOIN b USING (sha256)
    UNION ALL SELECT 'equal captions', sum((a.text = b.text)::INT), sum((a.text = b.text)::INT), count(*)
        FROM a JOIN b USING (sha256)"""
MEANS = """
    SELECT 'score ' || name, avg(x.value), avg(y.value), count(*)
    FROM scores_a AS x JOIN scores_b AS y USING (sha256, name) GROUP BY name ORDER BY name"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A run, or one caption pass of it."""

    folder: Path
    name: str  # of the pass; "": all

    @classmethod
    def parse(cls, text: str) -> Side:
        """`DIR`, or `DIR:NAME` for one caption pass."""
        folder, colon, name = text.rpartition(":")
        is_pass = colon and not Path(text).exists()
        return cls(folder=Path(folder if is_pass else text), name=name if is_pass else "")


def compare_runs(a: str, b: str, *, num_samples: int, format: str, out: IO[bytes]) -> None:
    """Prints measures of both sides, or with `num_samples` single images, those whose scores differ most first.

    Raises:
        UserError: a run has no such pass, or the two have no image in common.
    """
    import duckdb
    import pyarrow as pa

    with tempfile.TemporaryDirectory() as work, duckdb.connect() as joined:
        joined.execute(database.QUIET)
        for name, side in (("a", Side.parse(a)), ("b", Side.parse(b))):
            _copy_side(side, Path(work), name)
            for table in (name, f"scores_{name}"):
                joined.execute(f"CREATE VIEW {table} AS SELECT * FROM '{work}/{table}.parquet'")
        if joined.execute("SELECT count(*) FROM a JOIN b USING (sha256)").fetchall()[0][0] == 0:
            raise UserError(f"{a} and {b} have captions of no image in common: images are joined by their sha256")
        names, rows = _list_samples(joined, num_samples) if num_samples else _measure(joined)
        if format == "parquet":
            print_parquet(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), out)
        else:
            print_rows(names, rows, format, out)


def _copy_side(side: Side, work: Path, name: str) -> None:
    run = config.load(side.folder)
    if side.name and side.name not in run.sections["caption"]:
        passes = ", ".join(run.sections["caption"])
        raise UserError(f"{side.folder}: there is no caption pass {side.name!r}; there are {passes}")
    best = BEST.format(condition=f"c.name = {database.quote_literal(side.name)}" if side.name else "true")
    with database.connect_run(run) as connection:
        _write_parquet(work / f"{name}.parquet", CAPTION_COLUMNS, database.query_rows(connection, best + CAPTIONS))
        _write_parquet(work / f"scores_{name}.parquet", SCORE_COLUMNS, database.query_rows(connection, best + SCORES))


def _write_parquet(path: Path, columns: dict[str, str], rows: Iterator[tuple[Any, ...]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in columns.items()])
    with pq.ParquetWriter(path, schema) as writer:
        for batch in split_batches(rows, ROWS_AT_ONCE):
            values = [dict(zip(columns, row, strict=True)) for row in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema))


def _measure(joined: duckdb.DuckDBPyConnection) -> tuple[list[str], Iterable[tuple[Any, ...]]]:
    rows = [*joined.execute(COUNTS).fetchall(), *joined.execute(MEANS).fetchall()]
    changes = ((None if a is None or b is None else float(b) - float(a)) for _, a, b, _ in rows)
    return ["measure", "a", "b", "change", "pairs"], [
        (measure, a, b, change, pairs) for (measure, a, b, pairs), change in zip(rows, changes, strict=True)
    ]


def _list_samples(joined: duckdb.DuckDBPyConnection, num: int) -> tuple[list[str], Iterable[tuple[Any, ...]]]:
    common = "SELECT DISTINCT name FROM scores_a SEMI JOIN scores_b USING (name) ORDER BY name"
    scores = [name for (name,) in joined.execute(common).fetchall()]
    columns = ["a.sha256", "a.source_key", "a.kept AS kept_a", "b.kept AS kept_b"]
    columns += ["a.num_words AS words_a", "b.num_words AS words_b"]
    differences, joins = ["abs(b.num_words - a.num_words) / 1e6"], ""
    for number, name in enumerate(scores):
        for side in "ab":
            condition = (
                f"{side}{number}.sha256 = {side}.sha256 AND {side}{number}.name = {database.quote_literal(name)}"
            )
            joins += f" LEFT JOIN scores_{side} AS {side}{number} ON {condition}"
            columns.append(f"{side}{number}.value AS {database.quote_identifier(f'{name}_{side}')}")
        differences.insert(0, f"abs(b{number}.value - a{number}.value)")
    total = " + ".join(f"coalesce({one}, 0)" for one in differences)
    result = joined.execute(
        f"SELECT {', '.join([*columns, 'a.text AS text_a', 'b.text AS text_b'])} FROM a JOIN b USING (sha256){joins}"
        f" ORDER BY {total} DESC, sha256 LIMIT {num}"
    )
    return [column[0] for column in result.description or ()], result.fetchall()
