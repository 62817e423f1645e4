"""Tables: rows round-trip, files are whole or absent, and equal rows give equal bytes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BrokenTableError
from pipeline.records import Caption, Criterion, Exported, Image, Record, Score, Stat, Verdict, arrow_schema
from pipeline.storage import tables
from pipeline.storage.layout import unfinished_path

PROVENANCE = tables.Provenance(stage="caption", name="dense", version=1, slice={"a": [1, "é"]}, inputs={"image": "00"})
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation."""
    args = get_args(hint)
    if type(None) in args:
        return st.one_of(st.none(), *(values(arg) for arg in args if arg is not type(None)))
    if getattr(hint, "__origin__", None) is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return rows(hint)
    if args:  # Literal
        return st.sampled_from(args)
    return {
        str: TEXT,
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
    }[hint]


def rows(record: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(record)
    return st.builds(record, **{field.name: values(hints[field.name]) for field in dataclasses.fields(record)})


@pytest.mark.slow
@pytest.mark.parametrize("record", [Image, Caption, Score, Verdict, Stat, Exported])
def test_rows_round_trip(record: type[Record]) -> None:
    @given(st.lists(rows(record), max_size=5))
    def round_trip(given_rows: list[Record]) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "t.parquet"
            footer = tables.write_rows(path, record, given_rows, PROVENANCE)
            assert list(tables.read_rows(path, record)) == given_rows
            assert tables.read_footer(path) == footer
            assert (footer.provenance, footer.num_rows) == (PROVENANCE, len(given_rows))
            assert pq.read_schema(path).remove_metadata().equals(arrow_schema(record).remove_metadata())

    round_trip()


def test_equal_rows_give_equal_bytes_over_many_row_groups(tmp_path: Path) -> None:
    many = [score(f"{i:012d}") for i in range(2 * tables.ROWS_PER_GROUP + 7)]
    footers = [tables.write_rows(tmp_path / name, Score, iter(many), PROVENANCE) for name in ("a", "b")]
    assert footers[0] == footers[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.read_metadata(tmp_path / "a").num_row_groups == 3
    assert list(tables.read_rows(tmp_path / "a", Score)) == many


def score(key: str) -> Score:
    mark = Criterion(id="x", verdict="yes", value=1.0, weight=3.0, reason=None)
    return Score(key=key, caption="c", candidate=0, name="n", value=0.5, criteria=(mark,), status="ok", error=None)


def test_different_rows_have_different_digests(tmp_path: Path) -> None:
    one = tables.write_rows(tmp_path / "a", Score, [score("1")], PROVENANCE)
    other = tables.write_rows(tmp_path / "b", Score, [score("2")], PROVENANCE)
    assert one.digest != other.digest
    assert one.fingerprint == other.fingerprint


def test_statuses_are_counted_in_the_footer(tmp_path: Path) -> None:
    bad = dataclasses.replace(score("2"), status="unknown", value=None)
    tables.write_rows(tmp_path / "a", Score, [score("1"), bad, score("3")], PROVENANCE)
    footer = tables.read_footer(tmp_path / "a")
    assert footer is not None
    assert footer.statuses == {"ok": 2, "unknown": 1}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield score("1")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        tables.write_rows(tmp_path / "a", Score, broken(), PROVENANCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_a_truncated_table_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.parquet"
    tables.write_rows(path, Score, [score("1")], PROVENANCE)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BrokenTableError, match=r"a\.parquet"):
        tables.read_footer(path)


def test_a_table_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    tables.write_rows(path, Score, [score("1")], PROVENANCE)
    with pytest.raises(BrokenTableError, match=r"a\.parquet cannot be read as a table of image rows"):
        list(tables.read_rows(path, Image))


def test_a_missing_table_has_no_footer(tmp_path: Path) -> None:
    assert tables.read_footer(tmp_path / "none.parquet") is None


@pytest.mark.slow
def test_a_flipped_byte_in_a_page_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [score(str(i)) for i in range(20)]
    tables.write_rows(path, Score, rows, PROVENANCE)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(4, footer, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert list(tables.read_rows(path, Score)) == rows  # a byte that says nothing, as in a page's statistics
        except BrokenTableError as error:
            assert error.path == path


@pytest.mark.slow
def test_a_damaged_footer_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    tables.write_rows(path, Score, [score("1")], PROVENANCE)
    whole = path.read_bytes()
    first = whole.rindex(b'{"check"')
    for at in range(first, whole.index(b"}}", first) + 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BrokenTableError, match="damaged footer"):
            tables.read_footer(path)


def test_a_footer_longer_than_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    recipe = dataclasses.replace(PROVENANCE, slice={"words": "wörter " * 50_000})
    footer = tables.write_rows(path, Score, [score("1")], recipe)
    assert tables.read_footer(path) == footer


def test_a_file_replaces_what_killed_processes_left_beside_it(tmp_path: Path) -> None:
    """In a folder of unfinished work, files belong to others as well."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    paths = [unfinished_path(tmp_path / "README.md", work=folder) for folder in (tmp_path, tmp_path / "work")]
    gone = [path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")) for path in paths]
    (tmp_path / "work").mkdir()
    for path in (*paths, *gone):
        path.write_bytes(b"")
    with tables.open_atomic(tmp_path / "README.md") as file:
        file.write(b"a")
    with tables.open_atomic(tmp_path / "README.md", work=tmp_path / "work") as file:
        file.write(b"ab")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*paths, gone[1], tmp_path / "README.md"}
    assert (tmp_path / "README.md").read_bytes() == b"ab"
