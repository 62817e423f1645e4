"""Whole runs over hostile corpora: one correct row per input, no crash and no hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import hostile, wrapped
from tests.support.corpora import Expected


@pytest.mark.slow
def test_hostile_corpora_have_one_correct_row_per_input(tmp_path: Path) -> None:
    results = list(hostile.count_all(tmp_path, seed=1, num_mutants=100))
    print(*map(hostile.describe_counts, results), sep="\n")
    assert [counts.harm for counts in results] == [0] * 5
    assert all(counts.rows_right == counts.rows_expected == counts.files > 80 for counts in results)
    assert all(0 < counts.longest_decode < hostile.TIMEOUT for counts in results)
    assert all(0 < counts.decoder_mib < 512 for counts in results)
    assert all(counts.run_mib < 2048 for counts in results)
    others = {path.name for path in tmp_path.iterdir()} - {counts.corpus for counts in results}
    assert not others  # no name in a corpus wrote a file elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("make", [wrapped.tars, wrapped.tables, wrapped.downloads])
def test_a_seed_decides_the_corpus(make: wrapped.Maker, tmp_path: Path) -> None:
    first, second = make(tmp_path / "once", 1), make(tmp_path / "again", 1)
    names = [path.name for path in sorted((tmp_path / "once").iterdir())]
    assert first == second and len(names) == len(list((tmp_path / "again").iterdir())) > 10
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_rows_that_differ_are_counted() -> None:
    expected = [Expected(source_key="a", status="ok"), Expected(source_key="b", status="unreadable", error="cut")]
    good = {"source_key": "a", "status": "ok", "alt_text": None, "error": None}
    bad = {"source_key": "b", "status": "unreadable", "alt_text": None, "error": "it is cut off"}
    assert hostile.compare_rows(expected, [bad, good]) == (2, 0)
    assert hostile.compare_rows(expected, [good, good]) == (1, 1)
    assert hostile.compare_rows(expected, [bad | {"error": "it is gone"}]) == (0, 1)
    assert hostile.compare_rows(expected, [good | {"alt_text": ""}, bad]) == (1, 1)
