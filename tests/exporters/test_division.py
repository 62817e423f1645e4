"""Repartitioned training sets: balanced files without gaps, in order or shuffled, and the same bytes again."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.records import Placed
from pipeline.storage import tables
from pipeline.storage.layout import find_numbers
from stages.exporters import _division
from stages.exporters._division import SizeHistogram, shuffle_keys
from tests.support.runs import begin, corpus, files, make, recap, sections, write

FORMS = ["webdataset", "parquet", "captions", "lance", "messages", "sidecar"]
NUM = 60


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a folder of images that is captioned and filtered, in shards of 7."""
    folder = tmp_path_factory.mktemp("division")
    photos = corpus(folder / "photos", ["jpg", "png", "cut", "jpg", "webp", "jpg"] * (NUM // 6))
    run = begin(folder / "run", configure(photos))
    assert make(run).exit_code == 0
    shutil.rmtree(run / "export")
    return run


def configure(photos: Path, **export: Any) -> dict[str, dict[str, Any]]:
    parts = sections(photos, filter={"rules": {}}, export={"formats": FORMS, **export})
    return {**parts, "source": {**parts["source"], "shard_size": 7}}


def export(captioned: Path, folder: Path, *commands: str, **settings: Any) -> Path:
    """A copy of the run with other settings, exported by these commands, one after the other."""
    shutil.copytree(captioned.parent, folder)
    write(folder / "run", configure(folder / "photos", **settings))
    for command in commands or ("export",):
        recap("run", *command.split(), "--run", folder / "run")
    return folder / "run"


def read_rows(run: Path) -> list[Placed]:
    rows = [row for path in sorted((run / "export/index").glob("*.parquet")) for row in tables.read_rows(path, Placed)]
    assert rows == sorted(rows, key=lambda row: row.id)
    return rows


def list_exported(run: Path) -> dict[str, bytes]:
    """The files without times in them."""
    found = files(run / "export").items()
    return {name: data for name, data in found if not (name.startswith("index/") or name.endswith(".manifest"))}


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 3])
def test_files_are_balanced_and_numbered_without_gaps(captioned: Path, tmp_path: Path, shuffle: int | None) -> None:
    settings = {"shard_bytes": 12_000, **({} if shuffle is None else {"shuffle": shuffle})}
    run = export(captioned, tmp_path / "a", **settings)
    rows = read_rows(run)
    assert Counter(row.key for row in rows).keys() == {
        row["key"] for path in (run / "export/captions").glob("*.parquet") for row in read_parquet(path)
    }
    assert len({row.key for row in rows}) == len(rows) == NUM // 6 * 5
    assert (sorted(row.key for row in rows) == [row.key for row in rows]) == (shuffle is None)
    sizes = Counter[int]()
    for row in rows:
        sizes[row.number] += row.num_bytes + 600
    assert sorted(sizes) == list(range(len(sizes)))
    assert len(sizes) > 3
    assert max(sizes.values()) < 1.5 * min(sizes.values())
    for form, pattern in (("webdataset", "*.tar"), ("parquet", "*.parquet"), ("messages", "data/*.jsonl")):
        found = sorted((run / "export" / form).glob(pattern))
        assert [path.name.split(".")[0] for path in found] == [f"{number:05d}" for number in range(len(sizes))]
    with tarfile.open(run / "export/webdataset/00001.tar") as tar:
        keys = [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]
    assert keys == [row.key for row in rows if row.number == 1]
    assert "0 files damaged" in recap("verify", "--run", run).stderr


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.mark.slow
def test_files_are_the_same_whoever_writes_them_and_when(captioned: Path, tmp_path: Path) -> None:
    settings = {"shard_bytes": 9_000, "shuffle": 1, "split": {"train": 0.8, "val": 0.2}}
    expected = list_exported(export(captioned, tmp_path / "a", **settings))
    assert {name.split("/")[1] for name in expected if "/" in name} == {"train", "val"}
    by_shard = [f"export --shard {shard}" for shard in (4, 0, 2)]
    again = export(captioned, tmp_path / "b", "export:select", *by_shard, "export --workers 2", **settings)
    assert list_exported(again) == expected
    other = export(captioned, tmp_path / "c", **{**settings, "shuffle": 2})
    assert list_exported(other) != expected


@pytest.mark.slow
def test_chunks_of_few_rows_give_the_same_files(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits into memory at a time decides nothing."""
    settings = {"shard_bytes": 9_000, "shuffle": 1}
    expected = list_exported(export(captioned, tmp_path / "a", **settings))
    monkeypatch.setattr(_division, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_division, "ROWS_AT_ONCE", 1)
    run = export(captioned, tmp_path / "b", **settings)
    assert len(list((run / ".work").rglob("*.arrow"))) > 5
    assert list_exported(run) == expected


@pytest.mark.slow
def test_a_training_set_that_is_divided_otherwise_leaves_no_file_of_the_earlier_one(
    captioned: Path, tmp_path: Path
) -> None:
    run = export(captioned, tmp_path / "a")
    whole = list_exported(run)
    for settings in ({"shard_bytes": 2_000}, {"shard_bytes": 20_000, "shuffle": 5}, {}):
        write(run, configure(run.parent / "photos", **settings))
        recap("run", "export", "--stale", "redo", "--run", run)
        fresh = whole if not settings else list_exported(export(captioned, tmp_path / str(settings), **settings))
        assert list_exported(run) == fresh
        assert "0 files damaged" in recap("verify", "--run", run).stderr


@pytest.mark.slow
def test_the_images_of_a_file_have_like_aspects(captioned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(captioned.parent, folder)
    photos = folder / "pictures"
    photos.mkdir()
    for number in range(24):
        size = [(40, 40), (60, 41), (40, 62), (30, 120)][number % 4]
        Image.new("RGB", size, (number, 9 * number, 200)).save(photos / f"{number:02d}.png")
    run = begin(folder / "again", configure(photos, buckets=[1.0, 1.5, 0.67], formats=["webdataset"]))
    assert make(run).exit_code == 0
    rows = read_rows(run)
    aspects: dict[int, set[float]] = {}
    for row in rows:
        aspects.setdefault(row.number, set()).add(row.bucket)
        others = [abs(np.log(row.width / row.height / bucket)) for bucket in (1.0, 1.5, 0.67)]
        assert abs(np.log(row.width / row.height / row.bucket)) == min(others)
    assert all(len(buckets) == 1 for buckets in aspects.values())
    assert Counter(row.bucket for row in rows) == {1.0: 6, 1.5: 6, 0.67: 12}


def test_a_form_that_follows_the_corpus_is_not_divided(captioned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="files of overlay follow those of the corpus"):
        begin(tmp_path / "run", configure(captioned.parent / "photos", formats=["overlay"], shuffle=1))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=300), st.integers(1, 40), st.booleans())
def test_ranges_are_balanced_and_none_is_empty(sizes: list[int], num: int, is_shuffled: bool) -> None:
    places = np.arange(len(sizes), dtype=np.uint64)
    if is_shuffled:
        places = shuffle_keys([f"{place:012d}" for place in places.tolist()], 5)
    histogram = SizeHistogram(44 if is_shuffled else 0)
    for at in range(0, len(sizes), 7):
        histogram.add(places[at : at + 7], np.array(sizes[at : at + 7]))
    starts = histogram.split(num)
    assert histogram.num_bytes == sum(sizes)
    assert len(starts) == len(set(starts)) <= num
    which = np.searchsorted(np.array(starts, np.uint64), places, side="right") - 1
    held = np.bincount(which, weights=sizes, minlength=len(starts))
    assert (held > 0).all()
    assert held.max() <= sum(sizes) / num + 2 * max(sizes)


def test_wide_places_are_counted_in_wider_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_division, "NUM_BINS", 16)
    histogram = SizeHistogram(0)
    for at in range(0, 10_000, 100):
        histogram.add(np.arange(at, at + 100, dtype=np.uint64), np.full(100, 3))
    assert histogram.num_bytes == 30_000
    starts = histogram.split(4)
    assert [stop - start for start, stop in pairwise([*starts, 10_000])] == pytest.approx([2500] * 4, abs=1024)


def test_shuffled_places_are_a_permutation_that_the_seed_decides() -> None:
    keys = [f"{shard:06d}{index:06d}" for shard in range(20) for index in range(500)]
    first, second = (shuffle_keys(keys, seed) for seed in (1, 2))
    assert len(set(first.tolist())) == len(keys)
    assert (first == shuffle_keys(keys, 1)).all()
    orders = [np.argsort(places) for places in (first, second)]
    assert (orders[0] == orders[1]).mean() < 0.01
    moved = np.abs(orders[0] - np.arange(len(keys)))
    assert moved.mean() == pytest.approx(len(keys) / 3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("export/webdataset/00012.tar.idx", ["00012"]),
        ("export/mds/train/00012/index.json", ["00012"]),
        ("export/webdataset/index.json", []),
        ("export/messages/images/00012/000007000042.jpg", ["00012"]),
    ],
)
def test_numbers_of_files(name: str, numbers: list[str]) -> None:
    assert find_numbers(name) == numbers


def test_json_lines_name_images_of_their_own_file(captioned: Path, tmp_path: Path) -> None:
    run = export(captioned, tmp_path / "a", shard_bytes=9_000, formats=["messages"])
    for path in (run / "export/messages/data").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            assert row["images"][0].startswith(f"images/{path.stem}/")
            assert (run / "export/messages" / row["images"][0]).exists()


def list_settled(run: Path) -> dict[str, bytes]:
    """The exported files, without those of Lance that have an identity of their own, and the list of all."""
    found = files(run / "export").items()
    return {
        name: data for name, data in found if not {"_versions", "_transactions", "SHA256SUMS"} & {*Path(name).parts}
    }


@pytest.mark.slow
def test_splits_and_their_whole_leave_no_files_of_each_other(captioned: Path, tmp_path: Path) -> None:
    """Folders of loose files of the whole stayed beside those of splits."""
    run = export(captioned, tmp_path / "a")
    whole = list_settled(run)
    for split in ({"train": 0.8, "val": 0.2}, {"learn": 0.8, "val": 0.2}):
        write(run, configure(run.parent / "photos", split=split))
        recap("run", "export", "--stale", "redo", "--run", run)
        again = export(captioned, tmp_path / "-".join(split), split=split)
        assert list_settled(run) == list_settled(again)
    write(run, configure(run.parent / "photos"))
    recap("run", "export", "--stale", "redo", "--run", run)
    assert list_settled(run) == whole
    assert not [path for path in (run / "export").rglob("*") if path.is_dir() and not any(path.iterdir())]
    write(run, configure(run.parent / "photos", formats=["captions"]))
    done = recap("run", "export", "--stale", "redo", "--run", run)
    assert "export/webdataset is removed: export.formats no longer names its form" in done.stderr
    assert {path.name for path in (run / "export").iterdir() if path.is_dir()} == {"captions", "index"}
