"""Compacted copies change no answer: those that are current are read, and all others are ignored."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.commands import answers
from pipeline.commands.sql import list_queries, read_query
from pipeline.records import Caption
from pipeline.storage import compaction, database, tables
from tests.commands.test_verify import mend
from tests.support.flips import flip_bit
from tests.support.runs import begin, corpus, files, make, recap, sections

pytestmark = pytest.mark.slow

NUM_SHARDS = 6
STORED = ("yield", "lengths", "cost")  # the queries that most tests store the answers of: all take long


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compaction")
    photos = corpus(folder / "photos", ["jpg", "cut", "png"] * 4)
    two = {"caption__short": {"recipe": "short", "engine": "captioner"}}
    run = begin(folder / "run", sections(photos, source={"shard_size": 2}, **two))
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compaction, "SHARDS_PER_FILE", 4)
    monkeypatch.setattr(answers, "list_queries", lambda: [query for query in list_queries() if query[0] in STORED])
    return Path(shutil.copytree(finished, tmp_path / "run"))


def query_all(run: Path) -> dict[str, list[tuple[object, ...]]]:
    with database.connect_run(config.load(run)) as connection:
        named = {  # sorted, since some queries do not order equal rows
            name: sorted(database.query_rows(connection, read_query(name)), key=repr) for name, _ in list_queries()
        }
        every = {
            name: list(database.query_rows(connection, f"SELECT * FROM {name} ORDER BY ALL"))
            for name in ("plan", "image", "caption", "score", "verdict", "export", "stats")
        }
    return named | every


def print_all(run: Path) -> dict[str, str]:
    """What `recap query` prints, in the formats with and without types."""
    return {
        f"{name}.{form}": print_answer(run, name, form)
        for name, _ in list_queries()
        for form in ("json", "csv", "parquet")
        if name not in ("worst", "flags")  # they do not order equal rows
    }


def print_answer(run: Path, name: str, form: str) -> str:
    out = io.BytesIO()
    answers.print_named_query(config.load(run), name, form, out)
    if form != "parquet":
        return out.getvalue().decode()
    table = pq.read_table(io.BytesIO(out.getvalue()))
    return f"{table.schema} {table.to_pylist()}"  # in which NaN is like NaN


def test_stored_answers_are_those_of_the_queries_while_no_table_changes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "list_queries", list_queries)
    before = print_all(run)
    recap("compact", "--run", run)
    stored = {file.stem for file in (run / "compact" / "answers").iterdir()}
    assert stored == {name for name, _ in list_queries()}
    assert print_all(run) == before
    path = run / "verdict" / "00001.parquet"
    path.unlink()
    assert print_answer(run, "yield", "json") != before["yield.json"]
    assert print_answer(run, "lengths", "json") == before["lengths.json"]
    after = print_answer(run, "yield", "json")
    assert "query yield: answered" in recap("compact", "--run", run).stdout
    assert print_answer(run, "yield", "json") == after


def list_read(run: Path) -> list[str]:
    return compaction.list_current_files(run, "caption/*/*.parquet")


def test_copies_change_no_answer_and_no_other_file(run: Path) -> None:
    expected, before = query_all(run), files(run, without=(".work",))
    lines = recap("compact", "--run", run).stdout.splitlines()
    assert "caption/dense: 6 tables in 2 files" in lines and "stats/verdict: 6 tables in 2 files" in lines
    spans = ("00000-00003", "00004-00005")
    assert list_read(run) == [f"compact/caption/{name}/{span}.parquet" for name in ("dense", "short") for span in spans]
    assert query_all(run) == expected
    assert files(run, without=(".work", "compact")) == before
    assert recap("compact", "--run", run).stdout == ""
    assert make(run).done == 0


@pytest.mark.parametrize("change", ["redo", "remove", "touch", "damage"])
def test_an_outdated_copy_is_not_read_until_it_is_made_again(run: Path, change: str) -> None:
    recap("compact", "--run", run)
    path, copy = run / "caption/dense/00001.parquet", run / "compact/caption/dense/00000-00003.parquet"
    if change == "redo":
        footer, rows = tables.read_footer(path), list(tables.read_rows(path, Caption))
        assert footer is not None
        tables.write_rows(path, Caption, rows[:1], footer.provenance)
    elif change == "remove":
        path.unlink()
    elif change == "touch":
        path.touch()
    else:
        copy.write_bytes(copy.read_bytes()[:-50])
    assert f"compact/{copy.relative_to(run / 'compact')}" not in list_read(run)
    expected = query_all(run)
    recap("compact", "--run", run)
    assert list_read(run)[0].startswith("compact/caption/dense/")
    assert query_all(run) == expected
    shutil.rmtree(run / "compact")
    assert query_all(run) == expected


def test_verify_names_every_flipped_bit_of_a_copy_and_reads_copies_without_a_digest(run: Path) -> None:
    recap("compact", "--run", run)
    assert [*compaction.check_copies(run)] == []
    copy, noise = run / "compact" / "verdict" / "00000-00003.parquet", random.Random(19)
    data, sums = copy.read_bytes(), copy.with_suffix(".sha256")
    for _ in range(60):
        flip_bit(copy, noise)
        assert [path for path, _ in compaction.check_copies(run)] == [copy]
        copy.write_bytes(data)
    digest = sums.read_bytes()
    flip_bit(sums, noise)
    (line,) = recap("verify", "--run", run, check=False).stdout.splitlines()
    assert line.startswith("compact/verdict/00000-00003.parquet does not have the SHA-256 in 00000-00003.sha256")
    mend(line)
    assert (recap("verify", "--run", run).stdout, copy.read_bytes(), sums.read_bytes()) == ("", data, digest)
    sums.unlink()  # as of a copy that an earlier version made
    assert [*compaction.check_copies(run)] == []


def test_verify_names_a_damaged_copy_and_the_command_that_mends_it(run: Path) -> None:
    recap("compact", "--run", run)
    copy = run / "compact" / "verdict" / "00000-00003.parquet"
    data = bytearray(copy.read_bytes())
    data[60] ^= 16
    copy.write_bytes(data)
    (line,) = recap("verify", "--run", run, check=False).stdout.splitlines()
    assert line.startswith("compact/verdict/00000-00003.parquet cannot be read")
    assert line.endswith(f"rm -f {copy} && recap compact --run {run}")
