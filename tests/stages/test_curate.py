"""Curation: each image row has one curation row, copies and excluded pictures are dropped, and are never captioned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures
from skimage import data

from pipeline import config
from pipeline.commands import init
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.records import Caption, Curation, Image, MeasuredImage
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from stages.curate import KEPT, REASONS, Config, Images, group_images
from tests.support.runs import begin, corpus, make, recap, sections, write

pytestmark = pytest.mark.slow

PHOTOGRAPHS = ("chelsea", "coffee", "rocket")


def save_copies(folder: Path) -> Path:
    """Of each photograph: itself, its exact copy, a WebP and a small PNG; then a flat picture and a broken file."""
    folder.mkdir(parents=True)
    for name in PHOTOGRAPHS:
        picture = Pictures.fromarray(getattr(data, name)())
        picture.save(folder / f"{name}_0.jpg", quality=92)
        shutil.copy(folder / f"{name}_0.jpg", folder / f"{name}_1.jpg")
        picture.save(folder / f"{name}_2.webp", quality=70)
        picture.resize((160, 120)).save(folder / f"{name}_3.png")
    Pictures.new("RGB", (64, 64), "red").save(folder / "z_flat.png")
    (folder / "z_text.jpg").write_bytes(b"text")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_copies(tmp_path_factory.mktemp("copies") / "photos")


def start(folder: Path, photos: Path, **curate: Any) -> Path:
    return begin(folder / "run", sections(photos, source={"shard_size": 5}, curate=curate))


def read(run: Path, folder: str, record: Any) -> list[Any]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


def reasons(run: Path) -> dict[str, str | None]:
    """Source key -> reason."""
    images = read(run, "image", MeasuredImage)
    rows = read(run, "curation", Curation)
    assert [row.key for row in rows] == [image.key for image in images]
    assert all(row.drop == (row.reason is not None) for row in rows)
    return {image.source_key: row.reason for image, row in zip(images, rows, strict=True)}


def test_copies_are_dropped_and_never_captioned(photos: Path, tmp_path: Path) -> None:
    run = start(tmp_path, photos)
    assert make(run).exit_code == 0
    found = reasons(run)
    kinds = [None, "duplicate", "near_duplicate", "near_duplicate"]
    expected = {
        f"{name}_{n}.{end}": kinds[n] for name in PHOTOGRAPHS for n, end in enumerate(("jpg", "jpg", "webp", "png"))
    }
    assert found == {**expected, "z_flat.png": None, "z_text.jpg": "unsupported"}
    kept = [row.key for row in read(run, "curation", Curation) if not row.drop]
    assert [row.key for row in read(run, "caption/dense", Caption)] == kept
    first = read(run, "curation", Curation)[0]
    assert (first.group, first.representative, first.distance, first.copy_of) == (first.key, True, 0, first.key)
    assert "selected   4" in recap("query", "yield", "--run", run).stdout
    assert "near_duplicate" in recap("query", "curation", "--run", run).stdout
    assert json.loads((run / "export" / "stats.json").read_text())["dropped"] == {
        "duplicate": 3,
        "near_duplicate": 6,
        "unsupported": 1,
    }
    assert "curation dropped 10 images of the corpus: 3 `duplicate`" in (run / "export" / "README.md").read_text()
    recap("report", "--run", run)
    assert "near_duplicate" in (run / "report.html").read_text()
    assert recap("verify", "--run", run).stdout == ""


def test_the_selection_reads_images_and_groups(photos: Path, tmp_path: Path) -> None:
    run = start(tmp_path, photos, where="width > 200 AND phash IS NOT NULL")
    make(run, "curate")
    make(run, "ingest")
    make(run, "curate")
    assert {key for key, reason in reasons(run).items() if reason == "where"} == {
        *(f"{name}_3.png" for name in PHOTOGRAPHS),
        "z_flat.png",
    }
    write(run, sections(photos, source={"shard_size": 5}, curate={"where": "num_similar > 1 AND num_copies = 2"}))
    make(run, "curate", stale="redo")
    assert [key for key, reason in reasons(run).items() if reason is None] == [f"{name}_0.jpg" for name in PHOTOGRAPHS]
    assert reasons(run)["z_flat.png"] == "where"


def test_an_exclusion_that_would_exclude_nothing_is_refused(photos: Path, tmp_path: Path) -> None:
    run = start(tmp_path, photos, exclude=["../benchmark"])
    (tmp_path / "benchmark").mkdir()
    with pytest.raises(ConfigError, match=r"curate\.exclude: .*benchmark has no files; write a folder of images"):
        list_passes(config.load(run))
    (tmp_path / "benchmark" / "00000.tar").write_bytes(b"x" * 600)
    with pytest.raises(ConfigError, match=r"has 1 file \(\.tar\), none of them an image; unpack archives first"):
        list_passes(config.load(run))


def test_excluded_pictures_and_placeholders_are_dropped_whole(photos: Path, tmp_path: Path) -> None:
    benchmark = tmp_path / "benchmark"
    benchmark.mkdir()
    Pictures.fromarray(data.coffee()).resize((300, 200)).save(benchmark / "a.jpg")
    (benchmark / "notes.txt").write_text("not an image")
    run = start(tmp_path, photos, exclude=["../benchmark", "../hashes.txt"], placeholder=2)
    with pytest.raises(ConfigError, match=r"hashes\.txt"):
        list_passes(config.load(run))
    (tmp_path / "hashes.txt").write_text("# none yet\n")
    make(run, "ingest")
    rocket = next(row for row in read(run, "image", MeasuredImage) if row.source_key == "rocket_0.jpg")
    (tmp_path / "hashes.txt").write_text(f"{rocket.sha256}  rocket_0.jpg\n")
    make(run, "curate")
    found = reasons(run)
    assert {key for key, reason in found.items() if reason == "excluded"} == {
        *(key for key in found if key.startswith("coffee")),
        "rocket_0.jpg",
        "rocket_1.jpg",
    }
    assert {found["chelsea_0.jpg"], found["chelsea_1.jpg"]} == {"placeholder"}
    assert found["z_flat.png"] is None
    write(run, sections(photos, source={"shard_size": 5}, curate={"exclude": ["../benchmark/a.jpg"]}))
    assert (
        "exclude names 1 picture, 1 of them with a perceptual hash"
        in recap("run", "curate", "--run", run, "--stale", "redo").stderr
    )
    assert {key for key, reason in reasons(run).items() if reason == "excluded"} == {
        key for key in found if key.startswith("coffee")
    }
    write(run, sections(photos, source={"shard_size": 5}, curate={"exclude": ["../benchmark", "../hashes.txt"]}))
    (tmp_path / "hashes.txt").write_text("rocket_0.jpg\n")
    with pytest.raises(ConfigError, match="line 1"):
        list_passes(config.load(run))


@pytest.mark.parametrize("where", ["widht > 3", "width >", "sum(width) > 3", "width + 'a' > 3 AND (SELECT 1)"])
def test_a_wrong_selection_is_refused_at_once(photos: Path, tmp_path: Path, where: str) -> None:
    run = write(tmp_path / "run", sections(photos, curate={"where": where}))
    with pytest.raises(ConfigError, match=r"curate\.where"):
        list_passes(config.load(run))


def test_a_grown_corpus_makes_no_caption_stale(photos: Path, tmp_path: Path) -> None:
    own = shutil.copytree(photos, tmp_path / "photos")
    run = start(tmp_path, own)
    make(run)
    before = {path: path.stat().st_mtime_ns for path in (run / "caption").rglob("*.parquet")}
    shutil.copy(own / "chelsea_0.jpg", own / "zz_copy.jpg")
    corpus(own, ["jpg"] * 4, first=70_000)
    init.extend_plan(config.load(run))
    assert make(run).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert reasons(run)["zz_copy.jpg"] == "duplicate"
    assert len(list((run / "curation").glob("*.parquet"))) == len(list((run / "image").glob("*.parquet"))) > 3


def test_a_table_without_measures_reads_as_one_with_nulls(photos: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(photos, source={"shard_size": 20}))
    make(run, "ingest")
    (row, *_) = tables.read_rows(table_path(run, "image", 0), MeasuredImage)
    assert (row.phash, row.entropy, row.aspect) == (None, None, None)
    assert vars(next(tables.read_rows(table_path(run, "image", 0), Image))).items() <= vars(row).items()
    write(run, sections(photos, source={"shard_size": 20}, curate={}))
    assert make(run, stale="keep").exit_code == 0
    assert list(reasons(run).values()).count("duplicate") == len(PHOTOGRAPHS)
    assert recap("verify", "--run", run).stdout == ""


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30), st.integers(0, 30), st.integers(0, 4))
def test_every_image_is_kept_or_has_a_reason_that_growth_leaves(
    pictures: list[tuple[int, int]], num: int, max_distance: int
) -> None:
    """A picture is a number, of which bits are the hash, and a version of its bytes; number 0 is flat."""
    rows = group(pictures, max_distance)
    for index, row in enumerate(rows):
        leader = row["group"]
        assert leader <= index and rows[leader]["representative"] and rows[leader]["group"] == leader
        assert (REASONS[row["reason"]] == KEPT) == bool(row["representative"]) == (leader == index)
        assert (REASONS[row["reason"]] == "duplicate") == (leader != index and pictures[index] in pictures[:index])
        assert row["copy_of"] == pictures.index(pictures[index])
        assert row["num_copies"] == pictures.count(pictures[index])
        assert row["num_similar"] == int((rows["group"] == leader).sum())
    stable = ["group", "representative", "distance", "copy_of", "reason"]
    assert group(pictures[:num], max_distance)[stable].tolist() == rows[:num][stable].tolist()


def group(pictures: list[tuple[int, int]], max_distance: int) -> Any:
    numbers = np.array([[look, version] for look, version in pictures], np.uint64).reshape(-1, 2)
    zeros = np.zeros((len(pictures), 2), np.uint64)
    return group_images(
        Images(
            starts=np.array([0, len(pictures)]),
            reasons=np.zeros(len(pictures), np.int8),
            digests=np.column_stack((numbers, zeros)),
            hashes=np.column_stack((numbers[:, :1], zeros, zeros[:, :1])),
            has_hash=numbers[:, 0] > 0,
        ),
        [],
        Config(max_distance=max_distance, placeholder=0),
    )
