"""The export stage: real loaders read every row back, and images are byte for byte those of the corpus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Exported, column_names
from pipeline.storage import tables
from tests.support.runs import begin, corpus, make, sections


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    photos = corpus(folder / "photos", ["jpg", "png", "webp", "cut", "png"] * 9)
    run = begin(
        folder / "run",
        sections(photos, caption__dense={"num_candidates": 2}, filter={"rules": {"judged": "judge >= 0.3"}}),
    )
    assert make(run).exit_code == 0
    return run


@pytest.fixture(scope="module")
def index(run: Path) -> list[Exported]:
    paths = sorted((run / "export" / "index").glob("*.parquet"))
    rows = [row for path in paths for row in tables.read_rows(path, Exported)]
    assert 10 < len(rows) < 45
    return rows


def read_originals(run: Path, index: list[Exported]) -> list[bytes]:
    files = [(run.parent / "photos" / row.source_key).read_bytes() for row in index]
    assert [hashlib.sha256(data).hexdigest() for data in files] == [row.sha256 for row in index]
    return files


def test_webdataset_loads_every_row(run: Path, index: list[Exported]) -> None:
    import webdataset

    urls = [str(path) for path in sorted((run / "export" / "webdataset").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [row.key for row in index]
    assert [s["jpg"] for s in samples] == read_originals(run, index)
    assert [s["txt"].decode() for s in samples] == [row.caption for row in index]
    assert all(set(json.loads(s["json"])) == set(column_names(Exported)) for s in samples)
    decoded = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json")
    assert [image.size for image, _, _ in decoded] == [(row.width, row.height) for row in index]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_datasets_loads_every_row(run: Path, index: list[Exported], kind: str, tmp_path: Path) -> None:
    import datasets

    suffix = {"parquet": "parquet", "webdataset": "tar"}[kind]
    loaded: Any = datasets.load_dataset(
        kind,
        data_files=str(run / "export" / kind / f"*.{suffix}"),
        split="train",
        cache_dir=str(tmp_path),
    )
    image = "image" if kind == "parquet" else "jpg"
    assert isinstance(loaded.features[image], datasets.Image)
    raw = loaded.cast_column(image, datasets.Image(decode=False))
    assert [sample["bytes"] for sample in raw[image]] == read_originals(run, index)
    assert [picture.size for picture in loaded[image]] == [(row.width, row.height) for row in index]
    rows = loaded.remove_columns(image) if kind == "parquet" else [sample["json"] for sample in loaded]
    assert [row["caption"] for row in rows] == [row.caption for row in index]
    assert [(row["key"], row["source_key"], row["sha256"], row["alt_text"]) for row in rows] == [
        (row.key, row.source_key, row.sha256, row.alt_text) for row in index
    ]
    assert [row["scores"][0]["value"] for row in rows] == [row.scores[0].value for row in index]


def test_card_and_row_groups_suit_the_hub(run: Path) -> None:
    import pyarrow.parquet as pq

    for path in (run / "export" / "parquet").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        assert all(metadata.row_group(i).num_rows <= 100 for i in range(metadata.num_row_groups))
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "data_files: parquet/*.parquet" in card


def test_stats_match_the_index(run: Path, index: list[Exported]) -> None:
    stats = json.loads((run / "export" / "stats.json").read_text())
    assert stats["num_samples"] == len(index)
    assert stats["num_bytes"] == sum(row.num_bytes for row in index)
    assert stats["mean_words"] == pytest.approx(sum(len(row.caption.split()) for row in index) / len(index))


def test_shards_without_chosen_captions_have_no_files(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 15)
    parts = sections(photos, filter={"rules": {"first": "key < '000001'"}})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    assert [path.name for path in (run / "export" / "webdataset").iterdir()] == ["00000.tar"]
    index = (run / "export" / "index").glob("*.parquet")
    assert sorted(path.name for path in index) == ["00000.parquet", "00001.parquet"]


def test_image_extension_can_be_the_originals(tmp_path: Path) -> None:
    import tarfile

    photos = corpus(tmp_path / "photos", ["jpg", "png", "webp"])
    parts = sections(photos, export={"image_extension": "original"}, filter={"rules": {}})
    run = begin(tmp_path / "run", parts)
    make(run)
    names = tarfile.open(run / "export" / "webdataset" / "00000.tar").getnames()
    assert [name.split(".")[1] for name in names] == ["jpg", "json", "txt", "png", "json", "txt", "webp", "json", "txt"]


FORM = """
from stages.exporters import CardEntry

CARD = CardEntry(image="picture", caption="caption")


def open(run, shard, work):
    return Captions(run / "export" / "lines" / f"{shard:05d}.txt")


class Captions:
    def __init__(self, path):
        self.path, self.lines = path, []

    def add(self, sample, suffix):
        self.lines.append(sample.row.caption)

    def commit(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\\n".join(self.lines))
        return {f"export/lines/{self.path.name}": self.path.stat().st_size}

    def abandon(self):
        pass
"""


def test_a_form_can_be_a_module_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "lines.py").write_text(FORM)
    monkeypatch.syspath_prepend(str(tmp_path))
    photos = corpus(tmp_path / "photos", ["jpg"] * 3)
    run = begin(tmp_path / "run", sections(photos, export={"formats": ["own.lines", "parquet"]}, filter={"rules": {}}))
    assert make(run).exit_code == 0
    assert len((run / "export" / "lines" / "00000.txt").read_text().splitlines()) == 3
    card = (run / "export" / "README.md").read_text()
    assert "| `picture` / `image` | the original file |" in card
    assert "data_files: parquet/*.parquet" in card
