"""SQL over a run: its folder's name means nothing to DuckDB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import ConfigError, QueryError
from pipeline.storage import database, expressions
from stages.text.conditions import find_scores
from tests.support.runs import ROOT, begin, corpus, files, make, sections

VIEWS = ("plan", "image", "caption", "score", "verdict", "export")
ODD = (
    "text=x",
    "key=1/status=error",
    "a\\b {run}",
    "[!x]{a,b} a[b]",
    'it\'s "q" *?',
    "~",
    "**/name= %20\n;",
)
READ = """
import duckdb, sys
with duckdb.connect() as connection:
    for view in connection.extract_statements(open(sys.argv[1]).read()):
        try:
            connection.execute(view)
        except duckdb.IOException:  # the run has no rubrics
            pass
    print([connection.execute(f"FROM {view} ORDER BY ALL").fetchall() for view in sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sql")
    run = begin(folder / "plain", sections(corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 3)))
    assert make(run).exit_code == 0
    return run


def read_views(run: Path) -> list[list[tuple[Any, ...]]]:
    with database.connect(run) as connection:
        return [list(database.query_rows(connection, f"FROM {view} ORDER BY ALL")) for view in VIEWS]


names = st.text(st.sampled_from("ab=*?[]{}!\\'\"~%;$ -#/é\n"), min_size=1, max_size=12).map(
    lambda name: f"text=x/{name}"
)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(names)
@example("plain")
def test_views_are_the_same_under_any_path(run: Path, name: str) -> None:
    with TemporaryDirectory() as folder:
        odd = Path(folder) / name
        shutil.copytree(run, odd)
        assert read_views(odd) == read_views(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_filter_and_export_are_the_same_under_any_path(run: Path, tmp_path: Path, name: str) -> None:
    odd = shutil.copytree(run, tmp_path / name / run.name, ignore=shutil.ignore_patterns("verdict", "export", ".work"))
    assert make(odd).exit_code == 0
    assert files(odd) == files(run)
    assert read_views(odd) == read_views(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text=x", "a\\b[c]*"])
def test_plain_duckdb_reads_the_views_within_a_run_of_any_name(run: Path, tmp_path: Path, name: str) -> None:
    odd = shutil.copytree(run, tmp_path / name)
    command = [sys.executable, "-c", READ, str(ROOT / "manifests" / "views.sql"), *VIEWS]
    rows = [
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout for folder in (run, odd)
    ]
    assert rows[0] == rows[1]
    assert "alt text of number" in rows[0]


def test_nothing_outside_a_run_is_read(run: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(run, tmp_path / "text=x" / "run")
    (tmp_path / "text=x" / "secret.csv").write_text("a\nb\n")
    with database.connect(odd) as connection:
        root = f"/proc/self/fd/{max(int(fd) for fd in os.listdir('/proc/self/fd'))}"  # noqa: PTH208
        for path in (f"{odd}/../secret.csv", f"{root}/../secret.csv", "/proc/self/environ", "/proc/self/cwd/README.md"):
            with pytest.raises(QueryError):
                database.run_query(connection, f"FROM read_csv('{path}')")


def test_a_connection_leaves_no_open_handle(run: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        read_views(run)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    "sql",
    [
        "judge >= 0.4",
        "text LIKE '%a%' AND NOT contains(lower(text), 'b')",
        "len(list_filter(flags, flag -> flag = 'refusal')) = 0",
        "metadata::JSON ->> '$.a' = 'b' OR metadata::JSON -> 'a' IS NULL",
        "CASE WHEN width BETWEEN 1 AND 9 THEN text ~ '^a' ELSE status IN ('ok', 'empty') END",
        "coalesce(try_cast(alt_text AS INTEGER), 0) > greatest(width, height) % 7",
        "[flag.upper() FOR flag IN flags IF len(flag) > 1][1] IS DISTINCT FROM 'A'",
        "list_aggregate([width, height], 'max') > 9 AND age(DATE '2020-01-01', DATE '2019-01-01') > INTERVAL 1 DAY",
        "hash(key) % 10 = 3 AND extract(year FROM DATE '2020-01-01') = 2020",
    ],
)
@pytest.mark.parametrize("clause", ["SELECT {}", "SELECT 1 ORDER BY {}"])
def test_conditions_over_one_row_are_allowed(sql: str, clause: str) -> None:
    assert database.find_columns(sql, clause=clause) or "hash" in sql


@pytest.mark.parametrize("clause", ["SELECT {}", "SELECT 1 ORDER BY {}"])
@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        *((f"{name}() OVER (ORDER BY key) = 1", "window") for name in ("row_number", "rank", "cume_dist")),
        *((f"{name}(text) OVER (ORDER BY key) = text", "window") for name in ("lag", "lead", "first_value", "max")),
        ("count(*) OVER () > 1", "window"),
        *((f"{name}(width) > 1", f"{name} is not a function") for name in ("sum", "max", "list", "any_value", "count")),
        *(
            (f"{name}() IS NULL", f"{name} is not a function")
            for name in ("now", "today", "random", "uuid", "current_query")
        ),
        ("age(DATE '2020-01-01') > INTERVAL 1 DAY", "age of one date reads the clock"),
        ("list_aggregate([width], 'reservoir_quantile', 0.5) > 1", "list_aggregate needs the name of an aggregate"),
        ("list_aggregate([width], text) > 1", "list_aggregate needs the name of an aggregate"),
        ("ago(INTERVAL 1 DAY) > epoch_ms(width)", "ago is not a function"),
        ("current_setting('threads') = 1", "current_setting is not a function"),
        ("getenv('HOME') = text", "getenv is not a function"),
        ("nextval('a') = 1", "nextval is not a function"),
        ("NoW() > epoch_ms(1)", "now is not a function"),
        ("hour('2020-01-01 00:00:00+00'::timestamptz) > 1", "the machine's time zone"),
        ("CAST(text AS TIMESTAMP WITH TIME ZONE) IS NULL", "the machine's time zone"),
        ("try_cast(text AS timetz) IS NULL", "the machine's time zone"),
        ("key IN (SELECT key FROM caption)", "query inside"),
        ("$1 = 1", "parameter"),
    ],
)
def test_conditions_that_see_more_than_their_row_or_change_with_time_are_refused(
    sql: str, problem: str, clause: str
) -> None:
    with pytest.raises(QueryError, match=problem):
        database.find_columns(sql, clause=clause)


@pytest.mark.parametrize("name", ["current_date", "current_timestamp", "localtime", "current_user"])
def test_names_that_read_the_clock_without_parentheses_are_refused(run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"uses {name}; the columns are"):
        find_scores(config.load(run), "filter.rules.x", f"{name} IS NOT NULL")


@pytest.mark.parametrize(
    ("names", "problem"), [(["judge", "JUDGE"], "judge is the name of a score"), (["Width"], "width")]
)
def test_scores_are_named_apart_from_columns_and_each_other_in_any_case(names: list[str], problem: str) -> None:
    run = SimpleNamespace(file="run.toml", sections={"find": {}, "score": dict.fromkeys(names)})
    with pytest.raises(ConfigError, match=rf"score\.{names[-1]}: {problem}"):
        find_scores(run, "filter.rules.x", "width > 9")  # type: ignore[arg-type]


@pytest.mark.parametrize("clause", ["SELECT {}", "SELECT 1 ORDER BY {}"])
@pytest.mark.parametrize(
    ("name", "sql", "quoted"),
    [
        ("distinct", "distinct > 0.5 AND width > 9", '"distinct" > 0.5 AND width > 9'),
        ("order", "width > 9 AND order > 1", 'width > 9 AND "order" > 1'),
    ],
)
def test_a_score_named_like_a_keyword_needs_quotes(
    tmp_path: Path, name: str, sql: str, quoted: str, clause: str
) -> None:
    run = SimpleNamespace(file="run.toml", sections={"find": {}, "score": {"form": None, name: None}})
    with pytest.raises(ConfigError, match=f"the score {name} needs double quotes .*: '{quoted}'$"):
        find_scores(run, "filter.rules.x", sql, clause=clause)  # type: ignore[arg-type]
    assert find_scores(run, "filter.rules.x", quoted, clause=clause) == {name}  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is not a valid SQL (condition|order): [^;]*$"):
        find_scores(run, "filter.rules.x", "form >", clause=clause)  # type: ignore[arg-type]


def test_every_allowed_function_is_deterministic_in_this_duckdb() -> None:
    import duckdb

    known = "SELECT function_name FROM duckdb_functions() WHERE function_type = 'macro' OR stability = 'CONSISTENT'"
    with duckdb.connect() as connection:
        consistent = {name for (name,) in connection.execute(known).fetchall()}
    assert expressions.FUNCTIONS - consistent == {"->"}  # the parser's, for lambdas and JSON
