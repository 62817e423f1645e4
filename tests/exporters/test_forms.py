"""The export forms without their loaders: what is written, again the same, and damage that is found."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import plugins
from pipeline.records import Exported
from pipeline.storage import tables
from stages.exporters import sidecar
from stages.exporters._splits import draw_split
from tests.support.runs import begin, corpus, make, picture, recap, sections

FORMS = ("captions", "lance", "llava", "messages", "overlay", "parquet", "sidecar", "webdataset")
TAR_MEMBERS = ("0.jpg", "0.json", "1.PNG", "1.json", "sub/2.jpeg", "sub/2.json", "3.jpg", "3.json")


def write_tars(folder: Path) -> Path:
    """Two tars of images, as img2dataset names their members, with URLs."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, name in enumerate(TAR_MEMBERS):
                stem, _, extension = name.partition(".")
                kind = "png" if extension == "PNG" else "jpeg"
                metadata = json.dumps({"url": f"https://example.org/{stem}", "caption": "alt"}).encode()
                data = metadata if extension == "json" else picture(100 * number + i, kind)
                info = tarfile.TarInfo(f"{stem}{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return folder


def export(run: Path, source: dict[str, Any], **settings: Any) -> Path:
    parts = sections(run, filter={"rules": {}}, export={"formats": list(FORMS), **settings})
    begin(run, {**parts, "source": {"shard_size": 4, **source}})
    assert make(run).exit_code == 0
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a folder of images."""
    folder = tmp_path_factory.mktemp("photos")
    corpus(folder / "photos", ["jpg", "png", "webp", "cut", "jpg"])
    return export(folder / "run", {"kind": "folder", "path": str(folder / "photos")})


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over tars, which stay where they are."""
    folder = tmp_path_factory.mktemp("tars")
    return export(folder / "run", {"kind": "webdataset", "path": str(write_tars(folder / "tars"))})


def read_rows(run: Path) -> list[Exported]:
    return [
        row for path in sorted((run / "export/index").glob("*.parquet")) for row in tables.read_rows(path, Exported)
    ]


def read_lines(run: Path, pattern: str) -> list[dict[str, Any]]:
    files = sorted((run / "export").glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def list_files(run: Path) -> dict[str, bytes]:
    """The exported files; the tables, and Lance's manifest, have the time of the export in them."""
    found = (file for file in (run / "export").rglob("*") if file.is_file())
    timed = ("index", "_versions")
    return {str(file.relative_to(run)): file.read_bytes() for file in found if file.parent.name not in timed}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photos", "tars"])
def test_images_are_those_of_the_corpus_and_runs_verify(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    digests = {row.key: row.sha256 for row in read_rows(run)}
    assert len(digests) == {"photos": 4, "tars": 8}[kind]
    assert "0 files damaged" in recap("verify", "--run", run).stderr
    for form in FORMS:
        module = plugins.load("stages.exporters", form)
        is_compared = hasattr(module, "read_images") or hasattr(module, "list_loose_files")
        assert is_compared == getattr(module, "NEEDS_IMAGES", True), form


@pytest.mark.slow
def test_every_form_is_written_the_same_again(photos: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "run"
    shutil.copytree(photos.parent, again.parent)
    before = list_files(photos)
    shutil.rmtree(again / "export")
    recap("run", "export", "--run", again)
    assert list_files(again) == before
    table = again / "export" / "index" / "00000.parquet"
    table.unlink()
    recap("run", "export", "--run", again)
    assert list_files(again) == before
    assert list((again / ".work").rglob("*.tmp*")) == []


@pytest.mark.slow
def test_a_shard_of_which_nothing_is_kept_any_more_leaves_no_files(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(photos, run)
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("rules = {}", "rules = { late = \"key > '000001'\" }"))
    recap("run", "all", "--stale", "redo", "--run", run)
    assert not [name for name in list_files(run) if re.search(r"/00000[./]", name)]
    assert [row.key for row in read_rows(run)] == ["000001000000"]
    assert "0 files damaged" in recap("verify", "--run", run).stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llava", "messages", "sidecar"])
def test_a_damaged_image_file_is_found_and_repaired(form: str, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(photos, run)
    image = next((run / "export" / form).rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    found = recap("verify", "--run", run, check=False)
    assert found.returncode == 1
    (listed,) = [line for line in found.stdout.splitlines() if line.startswith("export/")]
    assert form in listed.split(":")[0]
    assert image.stem in listed


def test_captions_have_every_column_and_the_url(tars: Path) -> None:
    import duckdb

    files = f"{tars}/export/captions/*.parquet"
    found = duckdb.sql(f"SELECT key, source_key, sha256, caption, alt_text, url, scores FROM '{files}' ORDER BY key")
    rows = read_rows(tars)
    assert [row[:5] for row in found.fetchall()] == [
        (row.key, row.source_key, row.sha256, row.caption, row.alt_text) for row in rows
    ]
    assert {row[5] for row in found.fetchall()} == {f"https://example.org/{n}" for n in ("0", "1", "sub/2", "3")}


def test_parquet_compresses_all_but_the_image_files(photos: Path) -> None:
    group = pq.read_metadata(photos / "export/parquet/00000.parquet").row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    assert {path for path, column in columns.items() if column.compression == "UNCOMPRESSED"} == {"image.bytes"}
    assert "RLE_DICTIONARY" not in columns["image.bytes"].encodings
    assert "RLE_DICTIONARY" in columns["model"].encodings


def test_messages_and_conversations_have_one_picture_and_one_answer(photos: Path) -> None:
    rows = read_rows(photos)
    messages, llava = read_lines(photos, "messages/data/*.jsonl"), read_lines(photos, "llava/data/*.jsonl")
    for row, one, other in zip(rows, messages, llava, strict=True):
        question = "<image>\nDescribe this image in detail."
        assert [(turn["role"], turn["content"]) for turn in one["messages"]] == [
            ("user", question),
            ("assistant", row.caption),
        ]
        assert [(turn["from"], turn["value"]) for turn in other["conversations"]] == [
            ("human", question),
            ("gpt", row.caption),
        ]
        original = (photos.parent / "photos" / row.source_key).read_bytes()
        assert (photos / "export/messages" / one["images"][0]).read_bytes() == original
        assert (photos / "export/llava" / other["image"]).read_bytes() == original
        assert (one["key"], other["id"]) == (row.key, row.key)


def test_a_caption_file_has_one_line_and_stands_beside_its_image(photos: Path) -> None:
    listed = read_lines(photos, "sidecar/*/metadata.jsonl")
    for row, line in zip(read_rows(photos), listed, strict=True):
        image = photos / "export" / "sidecar" / row.key[1:6] / line["image_path"]
        assert image.with_suffix(".txt").read_text(encoding="utf-8") == f"{line['caption']}\n"
        assert line["caption"] == " ".join(row.caption.split())
        assert (line["file_name"], line["image_size"]) == (image.name, [row.width, row.height])


@pytest.mark.slow
def test_referenced_images_are_not_copied(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png"])
    corpus(photos / "more", ["webp"], first=1)
    run = export(
        tmp_path / "run",
        {"kind": "folder", "path": str(photos)},
        images="reference",
        formats=["llava", "messages", "overlay", "parquet", "sidecar"],
    )
    rows = read_rows(run)
    paths = [str(photos / row.source_key) for row in rows]
    assert [line["images"] for line in read_lines(run, "messages/data/*.jsonl")] == [[path] for path in paths]
    assert [line["image"] for line in read_lines(run, "llava/data/*.jsonl")] == paths
    assert [line["image_path"] for line in read_lines(run, "sidecar/*/metadata.jsonl")] == paths
    texts = sorted(str(file.relative_to(run / "export/sidecar/00000")) for file in (run / "export").rglob("*.txt"))
    assert texts == ["00000.txt", "00001.txt", "more/00001.txt"]
    assert not [file for form in ("messages", "llava", "sidecar") for file in (run / "export" / form).rglob("*.??g")]
    assert "0 files damaged" in recap("verify", "--run", run).stderr


@pytest.mark.slow
def test_images_inside_tars_cannot_be_referenced(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    parts = sections(tars, filter={"rules": {}}, export={"formats": ["messages"], "images": "reference"})
    run = begin(tmp_path / "run", {**parts, "source": {"kind": "webdataset", "path": str(tars)}})
    done = recap("run", "all", "--run", run, check=False)
    assert done.returncode == 2
    assert 'export.images is "reference"' in done.stderr


@pytest.mark.slow
def test_instructions_are_drawn_by_key(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 40)
    source = {"kind": "folder", "path": str(photos), "shard_size": 40}
    questions = ["What is shown?", "Describe the <image>."]
    run = export(tmp_path / "run", source, formats=["messages"], instructions=questions)
    asked = [line["messages"][0]["content"] for line in read_lines(run, "messages/data/*.jsonl")]
    assert set(asked) == {"<image>\nWhat is shown?", "<image>\nDescribe the image."}
    assert 8 < asked.count(asked[0]) < 32


def test_an_overlay_finds_each_image_in_the_corpus(tars: Path) -> None:
    places = pq.read_table(tars / "export/overlay/index").to_pylist()
    for row, place in zip(read_rows(tars), places, strict=True):
        assert (place["key"], place["sha256"], place["caption"]) == (row.key, row.sha256, row.caption)
        with tarfile.open(place["file"]) as tar:
            member = tar.getmember(place["member"])
        assert (member.offset_data, member.size) == (place["offset"], place["num_stored"])
    sizes = {file.relative_to(tars): file.stat().st_size for file in (tars / "export/overlay").rglob("*.tar")}
    assert len(sizes) == 2


@pytest.mark.parametrize("name", ["/a", "../a", "a//b", "a/./b", "", "a\0", "a\nb", "a:b", "x" * 300, "a/.."])
def test_names_that_lead_elsewhere_are_not_safe(name: str) -> None:
    assert not sidecar.is_safe_name(name)


@pytest.mark.slow
def test_splits_share_no_copies_and_replace_the_whole(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png"] * 20)
    for file in sorted(photos.glob("*.jpg")):
        shutil.copy(file, photos / f"copy-of-{file.name}")
    run = export(tmp_path / "run", {"kind": "folder", "path": str(photos), "shard_size": 30})
    whole = {row.key: row.sha256 for row in read_rows(run)}
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("[export]", "[export]\nsplit = { train = 0.75, val = 0.25 }"))
    recap("run", "export", "--stale", "redo", "--run", run)
    keys = {split: {line["key"] for line in read_lines(run, f"messages/{split}/data/*")} for split in ("train", "val")}
    assert keys["train"] | keys["val"] == whole.keys()
    digests = [{whole[key] for key in part} for part in keys.values()]
    assert digests[0].isdisjoint(digests[1])
    assert 0.5 < len(digests[0]) / 40 < 0.95
    assert {file.parent.name for file in (run / "export").glob("*/0000*.*")} == {"index"}
    assert "0 files damaged" in recap("verify", "--run", run).stderr
    info = json.loads((run / "export/webdataset/val/.nv-meta/.info.json").read_text())
    assert sum(info["shard_counts"].values()) == len(keys["val"])
    assert "- split: val\n    path: parquet/val/*.parquet" in (run / "export/README.md").read_text()
    assert "0 shard tables made" in recap("run", "export", "--run", run).stderr
    before = list_files(run)
    shutil.rmtree(run / "export")
    recap("run", "export", "--run", run)
    assert list_files(run).items() <= before.items()


@pytest.mark.parametrize("shares", [{"train": 0.98, "val": 0.02}, {"train": 1, "val": 1, "test": 2}])
def test_splits_have_their_shares(shares: dict[str, float]) -> None:
    drawn = Counter(draw_split(shares, seed=7, group=str(i)) for i in range(10_000))
    total = sum(shares.values())
    assert {name: drawn[name] / 10_000 for name in shares} == pytest.approx(
        {name: share / total for name, share in shares.items()}, abs=0.02
    )


@pytest.mark.slow
def test_larger_images_are_scaled_down_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    originals = {"large.jpg": picture(1, "jpeg", (90, 60)), "large.png": picture(2, "png", (60, 120))}
    originals |= {"small.jpg": picture(3), "small.webp": picture(4, "webp", (30, 200))}
    for name, data in originals.items():
        (photos / name).write_bytes(data)
    source = {"kind": "folder", "path": str(photos)}
    run = export(tmp_path / "run", source, resize={"short": 30}, quality=80, formats=["sidecar", "webdataset"])
    rows = {row.source_key: row for row in read_rows(run)}
    for name, row in rows.items():
        data = next((run / "export/sidecar/00000").glob(f"{row.key}.jpg")).read_bytes()
        assert hashlib.sha256(originals[name]).hexdigest() == row.sha256
        assert (data == originals[name]) == name.startswith("small") == (row.reencoded == row.written_sha256 == "")
        assert hashlib.sha256(data).hexdigest() == (row.written_sha256 or row.sha256)
        assert Image.open(BytesIO(data)).size == (row.width, row.height)
    assert [(row.width, row.height) for row in rows.values()] == [(45, 30), (30, 60), (40, 30), (30, 200)]
    assert rows["large.jpg"].reencoded == "jpeg, quality 80, 45 x 30"
    assert "0 files damaged" in recap("verify", "--run", run).stderr


@pytest.mark.slow
def test_near_copies_that_curate_grouped_are_in_one_split(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 12)
    shares = {"train": 0.5, "val": 0.5}
    parts = sections(photos, filter={"rules": {}}, export={"formats": ["captions"], "split": shares}, curate={})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    groups = recap("sql", 'SELECT key, "group" AS name FROM curation WHERE NOT drop', "--run", run, "--format", "json")
    drawn = {row["key"]: draw_split(shares, seed=0, group=row["name"]) for row in json.loads(groups.stdout)}
    files = {split: pq.read_table(run / "export/captions" / split)["key"].to_pylist() for split in shares}
    assert {key: split for split, keys in files.items() for key in keys} == drawn
    assert set(drawn.values()) == {"train", "val"}


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, {"train": 0.5, "val": 0.5}])
def test_the_card_loads_an_export_of_tars_alone(tmp_path: Path, split: dict[str, float] | None) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 12)
    keys = {"formats": ["webdataset"], **({"split": split} if split else {})}
    run = begin(tmp_path / "run", sections(photos, filter={"rules": {}}, export=keys))
    assert make(run).exit_code == 0
    loaded = datasets.load_dataset(str(run / "export"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == set(split or ["train"])
    assert sum(map(len, loaded.values())) == 12 and all(row["txt"] for part in loaded.values() for row in part)
