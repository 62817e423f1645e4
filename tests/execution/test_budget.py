"""`max_tokens` and `max_hours`: a run stops cleanly at them, and resumes when they are raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.records import Caption, Stat
from pipeline.storage.parts import read_spent
from pipeline.storage.tables import read_rows
from tests.support.runs import begin, corpus, files, make, recap, sections, write

pytestmark = pytest.mark.slow


def tables(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(run).items() if name.endswith((".parquet", ".tar"))}


def test_a_run_stops_at_max_tokens_and_resumes_when_it_is_raised(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg", "png"] * 8))
    assert make(begin(tmp_path / "whole", parts)).exit_code == 0
    run = begin(tmp_path / "run", parts, max_tokens=300)
    for _ in range(2):
        done = recap("run", "all", "--run", run, check=False)
        assert (done.returncode, "max_tokens = 300 is reached with" in done.stderr) == (3, True)
        assert "raise it in run.toml" in done.stderr
    passes = {p["title"]: p for p in json.loads(recap("status", "--run", run, "--json").stdout)}
    assert passes["caption:dense"]["num_missing"] > 0
    write(run, parts, max_tokens=10**9, max_hours=1000.0)
    assert make(run).exit_code == 0
    assert tables(run) == tables(tmp_path / "whole")


def test_interrupted_shards_count_towards_the_limit_and_in_the_statistics(tmp_path: Path) -> None:
    """Each further command spent as much again, and the statistics had the last attempt alone."""
    parts = sections(corpus(tmp_path / "photos", ["jpg", "png"] * 20), source={"shard_size": 40})
    run = begin(tmp_path / "run", parts, max_tokens=300)
    assert make(run).exit_code == 3
    hours, spent = read_spent(run)
    assert spent >= 300 and hours > 0
    assert make(run).exit_code == 3 and read_spent(run) == (hours, spent)
    write(run, parts)
    assert make(run).exit_code == 0
    (stat,) = read_rows(run / "stats" / "caption" / "dense" / "00000.parquet", Stat)
    rows = list(read_rows(run / "caption" / "dense" / "00000.parquet", Caption))
    assert 0 < stat.num_new_rows < stat.num_rows == len(rows)
    assert stat.num_output_tokens == sum(row.num_output_tokens or 0 for row in rows)
    assert stat.num_prompt_tokens == sum(row.num_prompt_tokens or 0 for row in rows)
    assert stat.seconds > hours


def test_a_retry_adds_to_what_its_table_took(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 30), engines__captioner={"empty_share": 0.4})
    run = begin(tmp_path / "run", parts, max_error_share=1.0)
    make(run)
    path = run / "stats" / "caption" / "dense" / "00000.parquet"
    (before,) = read_rows(path, Stat)
    make(run, "caption", retry=frozenset({"empty"}))
    (after,) = read_rows(path, Stat)
    assert after.num_prompt_tokens > before.num_prompt_tokens and after.seconds > before.seconds
    assert after.num_new_rows < after.num_rows


@pytest.mark.parametrize("limit", ["max_hours", "max_tokens"])
def test_nothing_is_made_beyond_a_limit_and_what_is_done_is_no_excess(tmp_path: Path, limit: str) -> None:
    zero = {limit: 0.0 if limit == "max_hours" else 0}
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 3))
    run = begin(tmp_path / "run", parts, **zero)
    outcome = make(run, "ingest")
    assert (outcome.exit_code, outcome.done, limit in outcome.limit) == (3, 0, True)
    write(run, parts)
    assert make(run).exit_code == 0
    write(run, parts, **zero)
    assert make(run).exit_code == 0
