"""SQL over a run: its folder's name means nothing to DuckDB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import QueryError
from pipeline.storage import database
from tests.support.runs import ROOT, begin, corpus, files, make, sections

VIEWS = ("plan", "image", "caption", "score", "verdict", "export")
ODD = (
    "text=x",
    "key=1/status=error",
    "a\\b",
    "a[b]",
    "[!x]{a,b}",
    "*?",
    'it\'s "q"',
    "~",
    "**/name=",
    "{run}",
    "%20\n;",
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


@settings(max_examples=10, deadline=None)
@given(names)
@example("plain")
def test_views_are_the_same_under_any_path(run: Path, name: str) -> None:
    with TemporaryDirectory() as folder:
        odd = Path(folder) / name
        shutil.copytree(run, odd)
        assert read_views(odd) == read_views(run)


@pytest.mark.parametrize("name", ODD)
def test_filter_and_export_are_the_same_under_any_path(run: Path, tmp_path: Path, name: str) -> None:
    odd = shutil.copytree(run, tmp_path / name / run.name, ignore=shutil.ignore_patterns("verdict", "export", ".work"))
    assert make(odd).exit_code == 0
    assert files(odd) == files(run)
    assert read_views(odd) == read_views(run)


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
