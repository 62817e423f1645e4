"""The reviewed spoiled captions of tests/data are those of today's code, and nearly all read right and are false."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from benchmarks import spoiled
from benchmarks.spoiled import Reviewed
from stages.audit.spoilers import KINDS, SpoiledText


@pytest.fixture(scope="module")
def rows() -> Sequence[Reviewed]:
    return spoiled.read_rows()[1]


def test_copies_are_what_the_code_makes(rows: Sequence[Reviewed]) -> None:
    """After a change: python -m benchmarks.spoiled --write, and review the rows without a verdict."""
    assert spoiled.spoil_rows(rows) == rows


def test_every_copy_is_reviewed_and_each_kind_is_there_often(rows: Sequence[Reviewed]) -> None:
    assert len({row.caption for row in rows}) == len(rows) == 500
    assert all(row.kind and row.reads_right is not None and row.is_false is not None for row in rows)
    kinds = Counter(row.kind for row in rows)
    assert kinds.keys() == KINDS.keys() and min(kinds.values()) >= 30


def test_nearly_all_read_right_and_are_false(rows: Sequence[Reviewed], capsys: pytest.CaptureFixture[str]) -> None:
    assert spoiled.compute_share(rows) >= 0.95
    assert all(row.note for row in rows if not (row.reads_right and row.is_false))
    spoiled.print_shares(rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("all                 500")


def test_a_changed_copy_loses_its_verdict(rows: Sequence[Reviewed]) -> None:
    old = Reviewed(picture="x", caption="A dog.", kind="object", spoiled="A cat.", reads_right=True, note="n")
    copy = SpoiledText(kind="object", text="A pig.", change="dog -> pig")
    new = spoiled.update_row(old, copy)
    assert (new.spoiled, new.reads_right, new.note) == ("A pig.", None, None)
    assert spoiled.update_row(new, copy) == new
