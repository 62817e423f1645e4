"""The survey of a whole run says of every shard what the ledger says of it alone, with a cache and without."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import config, starter
from pipeline.run import Runner
from pipeline.stamps import Overview, listings
from tests.runs import begin, corpus, make, sections, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    run = begin(folder / "run", sections(corpus(folder / "photos", ["jpg"] * 10), source={"shard_size": 2}))
    assert make(run).exit_code == 0
    return run


def kinds(run: Path) -> dict[str, list[str]]:
    runner = Runner(run=config.load(run))
    overview = Overview(runner.ledger, runner.plan, runner.passes)
    return {p.title: overview.kinds(p).tolist() for p in runner.passes}


def one_by_one(run: Path) -> dict[str, list[str]]:
    runner = Runner(run=config.load(run))
    return {p.title: [runner.ledger.state(p, shard).kind for shard in runner.wanted] for p in runner.passes}


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
    starter.plan(config.load(run))


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


def test_folders_are_listed_alike_here_and_elsewhere(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "7.tar").write_bytes(b"words")
    for name in ("x.tar", "7.tar.gz", ".8.tar"):
        (tmp_path / name).touch()
    patterns = [f"{finished}/image/*.parquet", f"{tmp_path}/*.tar", f"{tmp_path}/none/*.tar"]
    here, elsewhere = (listings(patterns, num_procs=num) for num in (1, 2))
    about = (tmp_path / "7.tar").stat()
    assert here == elsewhere
    assert sorted(here[0][::4]) == list(range(5))
    assert (here[1].tolist(), len(here[2])) == ([7, about.st_mtime_ns, 5, about.st_ino], 0)
