"""The survey of a whole run says of every shard what the ledger says of it alone, with a cache and without."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import config
from pipeline.commands import init, status
from pipeline.execution.run_state import RunState
from pipeline.execution.state_index import StateIndex, list_folders
from pipeline.slurm.jobs import JobMonitor
from pipeline.storage.layout import work_folder
from pipeline.storage.parts import write_failure
from tests.support.runs import begin, corpus, make, sections, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    run = begin(folder / "run", sections(corpus(folder / "photos", ["jpg"] * 10), source={"shard_size": 2}))
    assert make(run).exit_code == 0
    return run


def kinds(run: Path) -> dict[str, list[str]]:
    state = RunState(config.load(run))
    index = StateIndex(state.states)
    return {p.title: index.kinds(p).tolist() for p in state.passes}


def one_by_one(run: Path) -> dict[str, list[str]]:
    state = RunState(config.load(run))
    return {p.title: [state.states.state(p, shard).kind for shard in state.selected] for p in state.passes}


def gone(run: Path) -> None:
    (run / "caption" / "dense" / "00001.parquet").unlink()


def cut(run: Path) -> None:
    os.truncate(run / "image" / "00003.parquet", 50)


def nothing_made(run: Path) -> None:
    for name in ("image", "caption", "score", "verdict", "export"):
        shutil.rmtree(run / name)


def other_words(run: Path) -> None:
    photos = config.load(run).source.config.path
    write(run, sections(Path(photos), source={"shard_size": 2}, filter={"rules": {"judged": "judge >= 0.7"}}))


def of_another_shard(run: Path) -> None:
    shutil.copy(run / "caption" / "dense" / "00000.parquet", run / "caption" / "dense" / "00004.parquet")


def no_rows_read(run: Path) -> None:
    shutil.copy(run / "plan.parquet", run / "verdict" / "00002.parquet")


def no_images(run: Path) -> None:
    shutil.rmtree(run / "shards")


def cut_beside(run: Path) -> None:
    (run / "shards" / "00002.tar").unlink()
    os.truncate(run / "export" / "parquet" / "00001.parquet", 50)


def of_new_shards(run: Path) -> None:
    os.truncate(run / "shards" / "00001.tar", 50)
    corpus(Path(config.load(run).source.config.path), ["jpg"] * 4, first=10)
    init.extend_plan(config.load(run))


@pytest.mark.parametrize(
    "change",
    [
        gone,
        cut,
        nothing_made,
        other_words,
        of_another_shard,
        no_rows_read,
        no_images,
        cut_beside,
        of_new_shards,
    ],
)
def test_what_has_changed_is_seen_with_the_cache_and_without(
    finished: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for path in run.rglob("*.parquet"):
        os.utime(path, ns=(time.time_ns() - 10**10,) * 2)  # old enough to be kept
    assert kinds(run) == one_by_one(run)
    assert {kind for found in kinds(run).values() for kind in found} == {"done"}
    change(run)
    expected = one_by_one(run)
    assert {kind for found in expected.values() for kind in found} != {"done"}
    assert kinds(run) == expected
    assert kinds(run) == expected
    shutil.rmtree(run / ".work" / "stamps")
    assert kinds(run) == expected


def test_a_damaged_cache_is_no_cache(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    expected = kinds(run)
    for path in (run / ".work" / "stamps").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    assert kinds(run) == expected


def survey(run: Path) -> dict[str, status.PassStatus]:
    state = RunState(config.load(run))
    return {p.title: p for p in status.summarise_passes(state, JobMonitor.query_slurm(state))}


@pytest.mark.slow
def test_every_reason_is_told(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 7)
    for shard in range(7):
        parts = sections(photos, source={"shard_size": 1}, caption__dense={"num_candidates": shard + 1})
        run = begin(tmp_path / "run", parts) if shard == 0 else write(tmp_path / "run", parts)
        make(run, "ingest", shards=str(shard))
        make(run, "caption", shards=str(shard))
    found = survey(run)["caption:dense"]
    assert sorted(found.reasons) == [f"num_candidates: {num} -> 7" for num in range(1, 7)]
    assert (
        status.format_table([found], JobMonitor.query_slurm(RunState(config.load(run)))).count("num_candidates")
        == status.MAX_LINES
    )


@pytest.mark.parametrize("words", ["", '{"mess', "[]", "{}", "null"])
def test_last_words_that_do_not_read_are_none(finished: Path, tmp_path: Path, words: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "verdict" / "00001.parquet").unlink()
    folder = work_folder(run, "verdict", 1)
    write_failure(folder, "out of paper")
    assert survey(run)["filter"].failures == {"00001": "out of paper"}
    (folder / "failed.json").write_text(words)
    assert survey(run)["filter"].failures == {}


def test_forgetting_a_shard_does_not_take_longer_when_more_are_known(finished: Path) -> None:
    def seconds(num_known: int) -> float:
        ledger = RunState(config.load(finished)).states
        for shard in range(num_known):
            ledger.footer("image", shard)
        start = time.thread_time()
        for shard in range(100):
            ledger.forget(shard)
        return time.thread_time() - start

    assert seconds(20_000) < 20 * seconds(100)


def test_folders_are_listed_alike_here_and_elsewhere(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "7.tar").write_bytes(b"words")
    for name in ("x.tar", "7.tar.gz", ".8.tar"):
        (tmp_path / name).touch()
    patterns = [f"{finished}/image/*.parquet", f"{tmp_path}/*.tar", f"{tmp_path}/none/*.tar"]
    here, elsewhere = (list_folders(patterns, num_procs=num) for num in (1, 2))
    about = (tmp_path / "7.tar").stat()
    assert here == elsewhere
    assert sorted(here[0][::4]) == list(range(5))
    assert (here[1].tolist(), len(here[2])) == ([7, about.st_mtime_ns, 5, about.st_ino], 0)
