"""StateIndex gives every shard the state that ShardStates gives it alone, with and without the cache."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import config
from pipeline.commands import init, status
from pipeline.execution import run_state
from pipeline.execution.run_state import RunState
from pipeline.execution.state_index import StateIndex, list_folders
from pipeline.slurm.jobs import JobMonitor
from pipeline.storage.layout import work_folder
from pipeline.storage.parts import write_failure
from tests.support.runs import begin, corpus, make, sections, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    run = begin(
        folder / "run", sections(corpus(folder / "photos", ["jpg"] * 10), source={"shard_size": 2, "pack": True})
    )
    assert make(run).exit_code == 0
    return run


def find_kinds(run: Path) -> dict[str, list[str]]:
    state = RunState(config.load(run))
    index = StateIndex(state.states)
    return {p.title: index.kinds(p).tolist() for p in state.passes}


def find_kinds_one_by_one(run: Path) -> dict[str, list[str]]:
    state = RunState(config.load(run))
    return {p.title: [state.states.state(p, shard).kind for shard in state.selected] for p in state.passes}


def remove_table(run: Path) -> None:
    (run / "caption" / "dense" / "00001.parquet").unlink()


def truncate_table(run: Path) -> None:
    os.truncate(run / "image" / "00003.parquet", 50)


def remove_all_tables(run: Path) -> None:
    for name in ("image", "caption", "score", "verdict", "export"):
        shutil.rmtree(run / name)


def change_rules(run: Path) -> None:
    photos = config.load(run).source.config.path
    write(
        run,
        sections(Path(photos), source={"shard_size": 2, "pack": True}, filter={"rules": {"judged": "judge >= 0.7"}}),
    )


def copy_other_shard(run: Path) -> None:
    shutil.copy(run / "caption" / "dense" / "00000.parquet", run / "caption" / "dense" / "00004.parquet")


def no_rows_read(run: Path) -> None:
    shutil.copy(run / "plan.parquet", run / "verdict" / "00002.parquet")


def remove_images(run: Path) -> None:
    shutil.rmtree(run / "shards")


def truncate_payload(run: Path) -> None:
    (run / "shards" / "00002.tar").unlink()
    os.truncate(run / "export" / "parquet" / "00001.parquet", 50)


def add_shards(run: Path) -> None:
    os.truncate(run / "shards" / "00001.tar", 50)
    corpus(Path(config.load(run).source.config.path), ["jpg"] * 4, first=10)
    init.extend_plan(config.load(run))


@pytest.mark.parametrize(
    "change",
    [
        remove_table,
        truncate_table,
        remove_all_tables,
        change_rules,
        copy_other_shard,
        no_rows_read,
        remove_images,
        truncate_payload,
        add_shards,
    ],
)
def test_changes_are_found_with_and_without_the_cache(
    finished: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for path in run.rglob("*.parquet"):
        os.utime(path, ns=(time.time_ns() - 10**10,) * 2)  # old enough to be kept
    assert find_kinds(run) == find_kinds_one_by_one(run)
    assert {kind for found in find_kinds(run).values() for kind in found} == {"done"}
    change(run)
    expected = find_kinds_one_by_one(run)
    assert {kind for found in expected.values() for kind in found} != {"done"}
    assert find_kinds(run) == expected
    assert find_kinds(run) == expected
    shutil.rmtree(run / ".work" / "stamps")
    assert find_kinds(run) == expected


@pytest.mark.parametrize("change", [remove_table, truncate_table, change_rules, truncate_payload])
def test_a_run_of_many_shards_makes_what_a_run_of_few_makes(
    finished: Path, tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for many in (10**9, 1):
        monkeypatch.setattr(run_state, "MANY", many)
        run = shutil.copytree(finished, tmp_path / str(many))
        change(run)
        state = RunState(config.load(run), stale="redo")
        done = {p.folder for p in state.passes if all(state.states.state(p, n).kind == "done" for n in state.selected)}
        assert state.finished == (done if many == 1 else set())
        made, again = (make(run, stale="redo") for _ in range(2))
        outcomes.append((made.done, made.skipped, made.failures, again.done, again.skipped))
    assert outcomes[0] == outcomes[1]


def test_a_damaged_cache_is_ignored(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    expected = find_kinds(run)
    for path in (run / ".work" / "stamps").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    assert find_kinds(run) == expected


def summarise(run: Path) -> dict[str, status.PassStatus]:
    state = RunState(config.load(run))
    return {p.title: p for p in status.summarise_passes(state, JobMonitor.query_slurm(state))}


def test_every_reason_for_stale_shards_is_listed(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 7)
    for shard in range(7):
        parts = sections(photos, source={"shard_size": 1}, caption__dense={"num_candidates": shard + 1})
        run = begin(tmp_path / "run", parts) if shard == 0 else write(tmp_path / "run", parts)
        make(run, "ingest", shards=str(shard))
        make(run, "caption", shards=str(shard))
    found = summarise(run)["caption:dense"]
    assert sorted(found.reasons) == [f"num_candidates: {num} -> 7" for num in range(1, 7)]
    assert (
        status.format_table([found], JobMonitor.query_slurm(RunState(config.load(run)))).count("num_candidates")
        == status.MAX_LINES
    )


@pytest.mark.parametrize("words", ["", '{"mess', "[]", "{}", "null"])
def test_damaged_failure_files_are_ignored(finished: Path, tmp_path: Path, words: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "verdict" / "00001.parquet").unlink()
    folder = work_folder(run, "verdict", 1)
    write_failure(folder, "out of paper")
    assert summarise(run)["filter"].failures == {"00001": "out of paper"}
    (folder / "failed.json").write_text(words)
    assert summarise(run)["filter"].failures == {}


def test_forgetting_a_shard_takes_constant_time(finished: Path) -> None:
    def seconds(num_known: int) -> float:
        ledger = RunState(config.load(finished)).states
        for shard in range(num_known):
            ledger.footer("image", shard)
        start = time.thread_time()
        for shard in range(100):
            ledger.forget(shard)
        return time.thread_time() - start

    assert seconds(20_000) < 20 * seconds(100)


def test_folders_are_listed_alike_in_threads_and_processes(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "7.tar").write_bytes(b"words")
    for name in ("x.tar", "7.tar.gz", ".8.tar"):
        (tmp_path / name).touch()
    patterns = [f"{finished}/image/*.parquet", f"{tmp_path}/*.tar", f"{tmp_path}/none/*.tar"]
    here, elsewhere = (list_folders(patterns, num_procs=num) for num in (1, 2))
    about = (tmp_path / "7.tar").stat()
    assert here == elsewhere
    assert sorted(here[0][::4]) == list(range(5))
    assert (here[1].tolist(), len(here[2])) == ([7, about.st_mtime_ns, 5, about.st_ino], 0)
