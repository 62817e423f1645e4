"""A pass that reads the tables of all shards: made once they are all there, from work that its shards share."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

import stages
from pipeline import config
from pipeline.commands import init
from pipeline.execution.passes import AllShards
from pipeline.execution.run_state import RunState
from pipeline.execution.shared_work import ensure_shared
from pipeline.execution.state_index import StateIndex
from pipeline.storage import tables
from tests.support.runs import begin, corpus, make, sections

pytestmark = pytest.mark.slow

STAGE = '''
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pipeline.execution.passes import Pass
from pipeline.records import Image, Record


@dataclass(frozen=True, kw_only=True)
class Config: ...


@dataclass(frozen=True, kw_only=True)
class Rank(Record):
    """The images of smaller width in the whole run."""

    table: ClassVar[str] = "rank"
    key: str
    rank: int

    @property
    def id(self):
        return (self.key,)


def passes(run):
    if run.sections["ranks"]:
        common = dict(stage="ranks", version=1, slice={}, record=Rank, max_error_share=1.0, work=lambda rows, _: rows)
        whole = dict(reads=("image",), reads_all=("image",), prepare=prepare, inputs=rank)
        yield Pass(name="all", folder="rank", **whole, **common)
        yield Pass(name="copy", folder="rank_copy", reads=("rank",), inputs=copy, **common)


def prepare(shards, folder):
    widths = [
        width.as_py()
        for _, batches in shards.read_tables("image", Image, ["width"])
        for batch in batches
        for width in batch.column("width")
    ]
    (folder / "widths").write_text("\\n".join(map(str, sorted(widths))))
    with open(shards.run.folder / "prepared", "a") as log:
        log.write(f"{len(widths)}\\n")


def copy(shard):
    return shard.read_table("rank", Rank)


def rank(shard):
    widths = [int(line) for line in (shard.ensure_shared() / "widths").read_text().splitlines()]
    for image in shard.read_table("image", Image):
        yield Rank(key=image.key, rank=sum(width < image.width for width in widths))
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "ranks.py").write_text(STAGE)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path / "more")])
    monkeypatch.delitem(sys.modules, "stages.ranks", raising=False)
    photos = corpus(tmp_path / "photos", ["jpg"] * 6)
    return begin(tmp_path / "run", sections(photos, source={"shard_size": 2}, ranks={}))


def kinds(run: Path) -> dict[str, list[str]]:
    """The states of all tables, which shards give alone and together alike."""
    state = RunState(config.load(run))
    passes = [p for p in state.passes if p.stage == "ranks"]
    found = {p.title: StateIndex(state.states).kinds(p).tolist() for p in passes}
    state.states.forget_whole()
    assert found == {p.title: [state.states.state(p, n).kind for n in state.selected] for p in passes}
    return found


def prepared(run: Path) -> list[int]:
    return [int(line) for line in (run / "prepared").read_text().split()]


def test_each_shard_has_a_table_once_all_others_are_there(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(run, "ingest", shards="0,2")
    assert kinds(run) == {"ranks:all": ["blocked"] * 3, "ranks:copy": ["blocked"] * 3}
    outcome = make(run, "ranks:all", shards="2")
    assert outcome.exit_code == 1
    assert "1 of 3 tables of image/ that it reads are missing, image/00001.parquet the first" in capfd.readouterr().err
    make(run, "ingest")
    assert kinds(run)["ranks:all"] == ["missing"] * 3
    assert make(run, "ranks:all", shards="2").exit_code == make(run, "ranks").exit_code == 0
    assert prepared(run) == [6]
    assert kinds(run) == {"ranks:all": ["done"] * 3, "ranks:copy": ["done"] * 3}
    assert make(run, "ranks").done == 0


def test_a_grown_corpus_makes_them_again_and_leaves_tables_whose_rows_are_unchanged(run: Path) -> None:
    make(run, "ingest")
    make(run, "ranks")
    corpus(run.parent / "photos", ["png"], first=6)
    init.extend_plan(config.load(run))
    assert kinds(run)["ranks:all"] == ["blocked"] * 4
    assert kinds(run)["ranks:copy"] == [*["done"] * 3, "blocked"]
    make(run, "ingest")
    assert kinds(run)["ranks:all"] == [*["behind"] * 3, "missing"]
    assert make(run, "ranks:all").done == 4
    assert kinds(run)["ranks:copy"] == [*["done"] * 3, "missing"]
    assert make(run, "ranks:copy").done == 1
    assert prepared(run) == [6, 7]


def test_a_changed_table_of_another_shard_is_noticed(run: Path) -> None:
    make(run, "ingest")
    make(run, "ranks")
    file = sorted((run.parent / "photos").glob("*.jpg"))[-1]
    file.write_bytes(file.read_bytes() + b" ")
    (run / "image" / "00002.parquet").unlink()
    make(run, "ingest")
    assert kinds(run)["ranks:all"] == ["behind"] * 3
    shutil.copy(run / "image" / "00002.parquet", run / "image" / "00001.parquet")
    assert kinds(run)["ranks:all"] == ["behind"] * 3


def test_of_several_at_once_one_does_the_shared_work(run: Path) -> None:
    make(run, "ingest")
    (leftover := run / ".work" / "rank" / ".shared-0.00000000-1-000000000000.tmp").mkdir(parents=True)
    state = RunState(config.load(run))
    p = next(p for p in state.passes if p.prepare)
    shards = AllShards(run=state.run, num_shards=3, stop=Event())
    provenance: tables.Provenance = state.states.provenance(p, 0)
    with ThreadPoolExecutor(4) as threads:
        folders = {*threads.map(lambda _: ensure_shared(p, shards, provenance), range(4))}
    assert len(folders) == 1
    assert prepared(run) == [6]
    assert {path.name for path in (run / ".work" / "rank").iterdir()} - {leftover.name} == {folders.pop().name}
