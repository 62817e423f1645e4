"""The plan: shards fill up, specs parse and print, and no key changes when the corpus grows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MachineError, RefusedError, SpecError
from pipeline.records import Piece, Planned, make_key
from pipeline.storage import tables
from pipeline.storage.lock import hold_lock
from pipeline.storage.plan import Plan, assign_shards, count_shards, format_spec, parse_spec, write_plan

sizes = st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=12)


def corpus(sizes: list[int | None]) -> list[Piece]:
    return [Piece(file=f"file{i}", start=0, stop=size) for i, size in enumerate(sizes)]


def samples(rows: list[Planned], *, unknown: int = 3) -> list[tuple[str, str, int]]:
    """(key, file, position in the file) of every sample, where a piece of unknown length has `unknown`."""
    found, indices = [], dict[int, int]()
    for row in rows:
        for position in range(row.start, unknown if row.stop is None else row.stop):
            index = indices[row.shard] = indices.get(row.shard, -1) + 1
            found.append((make_key(row.shard, index), row.file, position))
    return found


@given(sizes, st.integers(1, 10))
def test_every_sample_is_planned_once_in_order(sizes: list[int | None], shard_size: int) -> None:
    rows = list(assign_shards(corpus(sizes), shard_size=shard_size))
    expected = [(f"file{i}", n) for i, size in enumerate(sizes) for n in range(3 if size is None else size)]
    assert [(file, position) for _, file, position in samples(rows)] == expected
    keys = [key for key, _, _ in samples(rows)]
    assert keys == sorted(set(keys))


@given(sizes, st.integers(1, 10))
def test_shards_have_the_given_size_and_unknown_lengths_a_shard_each(sizes: list[int | None], shard_size: int) -> None:
    rows = list(assign_shards(corpus(sizes), shard_size=shard_size))
    for shard in {row.shard for row in rows}:
        pieces = [row for row in rows if row.shard == shard]
        if any(row.stop is None for row in pieces):
            assert len(pieces) == 1
        else:
            assert sum(row.stop - row.start for row in pieces if row.stop is not None) <= shard_size


@pytest.mark.slow
@given(sizes, st.integers(1, 10))
def test_digests_of_all_shards_equal_those_of_each(sizes: list[int | None], shard_size: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.parquet"
        _, num_shards = write_plan(path, corpus(sizes), shard_size=shard_size)
        plan, _ = Plan.load(path)
        assert list(plan.digests()) == [plan.digest(shard) for shard in range(num_shards)]


@pytest.mark.slow
@given(sizes, sizes, st.integers(1, 10), st.lists(st.integers(0, 9), max_size=12))
def test_no_key_moves_when_the_corpus_grows(
    sizes: list[int | None], more: list[int | None], shard_size: int, growth: list[int]
) -> None:
    grown = [
        size if size is None else size + growth[i % len(growth)] if growth else size for i, size in enumerate(sizes)
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.parquet"
        write_plan(path, corpus(sizes), shard_size=shard_size)
        before = list(tables.read_rows(path, Planned))
        write_plan(path, corpus([*grown, *more]), shard_size=shard_size)
        after = list(tables.read_rows(path, Planned))
        write_plan(path, corpus([*grown, *more]), shard_size=shard_size)
        assert list(tables.read_rows(path, Planned)) == after
    assert after[: len(before)] == before
    assert all(row.shard > before[-1].shard for row in after[len(before) :] if before)
    everything = {(file, position) for _, file, position in samples(after)}
    assert everything == {(p.file, n) for p in corpus([*grown, *more]) for n in range(3 if p.stop is None else p.stop)}
    assert len(samples(after)) == len(everything)


def test_part_of_a_plan_reads_like_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    write_plan(path, corpus([7] * 5000), shard_size=10)
    whole, every = Plan.load(path)
    some, wanted = Plan.load(path, "2990-2995")
    assert (count_shards(path), len(every), list(wanted)) == (3500, 3500, list(range(2990, 2996)))
    for shard in wanted:
        assert some.pieces(shard) == whole.pieces(shard)
        assert some.digest(shard) == whole.digest(shard)
        assert some.num_samples(shard) == 10


@given(st.sets(st.integers(0, 400), min_size=1))
def test_specs_round_trip(shards: set[int]) -> None:
    assert parse_spec(format_spec(shards), 401) == sorted(shards)


@given(st.integers(0, 500), st.integers(1, 40))
def test_blocks_cover_the_plan_once(num_shards: int, num_blocks: int) -> None:
    blocks = [list(parse_spec(f"{i}/{num_blocks}", num_shards)) for i in range(num_blocks)]
    assert [shard for block in blocks for shard in block] == list(range(num_shards))


@pytest.mark.parametrize(
    ("spec", "shards"),
    [("7", [7]), ("0-9", list(range(10))), ("0-9:4", [0, 4, 8]), ("3,5,8-11", [3, 5, 8, 9, 10, 11]), ("5,3,5", [3, 5])],
)
def test_specs_as_users_write_them(spec: str, shards: list[int]) -> None:
    assert list(parse_spec(spec, 12)) == shards


@pytest.mark.parametrize("spec", ["", "x", "12", "3-1", "0-12", "1/0", "2/2", "1,,2", "-1", "0-4:0", "all,1"])
def test_wrong_specs_are_explained(spec: str) -> None:
    with pytest.raises(SpecError, match="--shard"):
        parse_spec(spec, 12)


@pytest.mark.slow
def test_plans_at_once_keep_the_shards_of_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    write_plan(path, corpus([5]), shard_size=2)
    before = list(tables.read_rows(path, Planned))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=extend, args=(path, f"more{n}")) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    after = list(tables.read_rows(path, Planned))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert after[: len(before)] == before
    assert {row.file for row in after} == {"file0", *(f"more{n}-{i}" for n in range(3) for i in range(5))}
    assert [row.shard for row in after] == sorted(row.shard for row in after)
    assert len({(row.file, row.start) for row in after}) == len(after)
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def extend(path: Path, name: str) -> None:
    """Extends the plan five times, as `recap plan` after each of five files came."""
    for i in range(5):
        write_plan(path, [Piece(file=f"{name}-{n}", start=0, stop=3) for n in range(i + 1)], shard_size=2)


@pytest.mark.parametrize("has_links", [True, False])
def test_locks_of_processes_that_are_gone_are_removed_and_others_respected(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "as exFAT")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.write_text(json.dumps({"host": platform.node(), "pid": dead.pid}))
    with hold_lock(path) as is_held:
        assert is_held()
        with pytest.raises(RefusedError, match=rf"held by another process.*{os.getpid()}"), hold_lock(path, max_wait=0):
            pass
        assert is_held()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(RefusedError, match="elsewhere"), hold_lock(path, max_wait=0):
        pass
    os.utime(path, (0, 0))
    with hold_lock(path):
        assert os.getpid() == json.loads(path.read_text())["pid"]
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_a_plan_that_was_taken_over_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    write_plan(path, corpus([5]), shard_size=2)
    before = path.read_bytes()

    def place(file: str) -> str:  # called while the lock is held
        (tmp_path / ".plan.parquet.lock").unlink(missing_ok=True)
        return file

    with pytest.raises(MachineError, match="run the command again"):
        write_plan(path, corpus([5, 5]), shard_size=2, place=place)
    assert path.read_bytes() == before


@pytest.mark.parametrize("num", [1, pytest.param(2500, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path, num: int) -> None:
    path = tmp_path / "plan.parquet"
    write_plan(path, corpus([7] * num), shard_size=10)
    content, (whole, _) = path.read_bytes(), Plan.load(path)
    random, num_refused = Random(1), 0
    for _ in range(300):
        at, bit = random.randrange(len(content)), random.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            plan, _ = Plan.load(path)
        except MachineError as error:
            num_refused += 1
            assert "plan.parquet is damaged" in str(error) and "restore it from a backup" in str(error)
            with pytest.raises(MachineError, match="damaged"):
                write_plan(path, corpus([*[7] * num, 1]), shard_size=10)
        else:
            assert (plan.num_shards, plan.rows.equals(whole.rows)) == (whole.num_shards, True)
    assert num_refused > 200
    path.write_bytes(content[:-20])
    with pytest.raises(MachineError, match="damaged"):
        Plan.load(path)


def test_a_plan_without_checksums_stays_readable(tmp_path: Path) -> None:
    new, old = tmp_path / "new.parquet", tmp_path / "old.parquet"
    write_plan(new, corpus([7, None, 3]), shard_size=2)
    rows = list(tables.read_rows(new, Planned))
    tables.write_rows(old, Planned, rows, tables.Provenance(stage="plan", name="", version=1, slice={}, inputs={}))
    assert list(Plan.load(old)[0].digests()) == list(Plan.load(new)[0].digests())
    assert write_plan(old, corpus([7, None, 3, 1]), shard_size=2)[1] == count_shards(new) + 1
