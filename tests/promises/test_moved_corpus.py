"""After a corpus in tars or Parquet moves, only `source.path` has to change."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.commands import init
from pipeline.records import Piece, Planned
from pipeline.storage import tables
from pipeline.storage.plan import Plan, write_plan
from stages.training.dataset import read_image_file
from tests.support.runs import begin, make, picture, sections, write
from tests.support.training_runs import read_sft_examples
from tests.support.wrapped import make_tar

pytestmark = pytest.mark.slow


def corpus(folder: Path, kind: str) -> Path:
    """Two files of three images each, one of them in a subfolder."""
    for number, name in enumerate(("00", "deep/01")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images = {f"{number}{letter}.jpg": picture(10 * number + n) for n, letter in enumerate("abc")}
        if kind == "parquet":
            pq.write_table(pa.table({"image": list(images.values()), "key": list(images)}), f"{path}.parquet")
        else:
            path.with_suffix(".tar").write_bytes(make_tar(images))
    return folder


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_corpus_may_be_moved(kind: str, tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "here", kind), source={"kind": kind, "shard_size": 3})
    run = begin(tmp_path / "run", parts)
    assert make(run, "ingest").done == 2
    (tmp_path / "here").rename(tmp_path / "there")
    assert make(run, "caption").exit_code == (kind == "webdataset")  # its images are read from the tars
    parts["source"]["path"] = str(tmp_path / "there")
    write(run, parts)
    assert init.extend_plan(config.load(run)) == (2, 2)
    outcome = make(run)
    assert (outcome.exit_code, outcome.failures) == (0, {})
    assert make(run).done == 0
    examples = read_sft_examples(run, captions=["dense"])
    digests = [sha256(read_image_file(vars(example))).hexdigest() for example in examples]
    assert digests == [example.sha256 for example in examples]
    assert len(examples) == 6


def test_pieces_are_named_relative_to_the_corpus(tmp_path: Path) -> None:
    from pipeline.sources import webdataset

    corpus(tmp_path / "c", "webdataset")

    def list_names(*paths: str) -> list[str]:
        paths = tuple(f"{tmp_path}/c{path}" for path in paths)
        source = webdataset.Config(path=paths if len(paths) > 1 else paths[0])
        pieces = list(webdataset.pieces(source))
        assert all(Path(webdataset.place(piece.file, source)).is_file() for piece in pieces)
        return [piece.file for piece in pieces]

    assert list_names("") == list_names("/") == ["00.tar", "deep/01.tar"]
    assert list_names("/*.tar") == list_names("/00.tar") == list_names("/{00..00}.tar") == ["00.tar"]
    assert list_names("/deep/{01..01}.tar") == ["01.tar"]
    assert list_names("/00.tar", "/deep") == [f"{tmp_path}/c/00.tar", f"{tmp_path}/c/deep/01.tar"]


def test_a_plan_with_absolute_paths_is_not_doubled(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "c", "webdataset"), source={"kind": "webdataset"}))
    path = run / "plan.parquet"
    short = [row.file for row in tables.read_rows(path, Planned)]
    assert short == ["00.tar", "deep/01.tar"]
    path.unlink()
    write_plan(path, [Piece(file=f"{tmp_path}/c/{name}") for name in short], shard_size=10)
    assert init.extend_plan(config.load(run)) == (2, 2)
    assert make(run, "caption").exit_code == 1 and make(run, "ingest").exit_code == 0
    assert make(run, "caption").exit_code == 0
    assert Plan.load(path)[0].pieces(1) == [Piece(file=f"{tmp_path}/c/deep/01.tar")]
