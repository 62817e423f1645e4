"""The hostile corpus in every wrapping, through whole runs: one right row each, and nothing crashes or hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import hostile, wrapped
from tests.support.corpora import Expected


@pytest.mark.slow
def test_hostile_corpora_have_one_right_row_for_each_input(tmp_path: Path) -> None:
    found = list(hostile.counted(tmp_path, seed=1, num_mutants=100))
    print(*map(hostile.told, found), sep="\n")
    assert [counts.harm for counts in found] == [0] * 5
    assert all(counts.rows_right == counts.rows_expected == counts.files > 80 for counts in found)
    assert all(0 < counts.longest_decode < hostile.TIMEOUT for counts in found)
    assert all(0 < counts.decoder_mib < 512 for counts in found)
    assert all(counts.run_mib < 2048 for counts in found)
    others = {path.name for path in tmp_path.iterdir()} - {counts.corpus for counts in found}
    assert not others  # no name in a corpus led anywhere


@pytest.mark.slow
@pytest.mark.parametrize("make", [wrapped.tars, wrapped.tables, wrapped.downloads])
def test_a_corpus_is_the_same_for_a_seed(make: wrapped.Maker, tmp_path: Path) -> None:
    once, again = make(tmp_path / "once", 1), make(tmp_path / "again", 1)
    names = [path.name for path in sorted((tmp_path / "once").iterdir())]
    assert once == again and len(names) == len(list((tmp_path / "again").iterdir())) > 10
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_what_is_counted_is_what_differs() -> None:
    expected = [Expected(source_key="a", status="ok"), Expected(source_key="b", status="unreadable", error="cut")]
    good = {"source_key": "a", "status": "ok", "alt_text": None, "error": None}
    bad = {"source_key": "b", "status": "unreadable", "alt_text": None, "error": "it is cut off"}
    assert hostile.compared(expected, [bad, good]) == (2, 0)
    assert hostile.compared(expected, [good, good]) == (1, 1)
    assert hostile.compared(expected, [bad | {"error": "it is gone"}]) == (0, 1)
    assert hostile.compared(expected, [good | {"alt_text": ""}, bad]) == (1, 1)
