"""The export stage: real loaders read every row back, and images are byte for byte those of the corpus."""

from __future__ import annotations

import hashlib
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.decoding.images import probe
from pipeline.records import Exported, NamedScore, column_names
from pipeline.storage import tables
from stages.exporters import ExportSample, join_lines, parquet, webdataset
from tests.support.corpora import set_orientation
from tests.support.runs import begin, corpus, make, recap, sections

OPTIONAL = {"reencoded", "written_sha256", "num_tokens", "cut", "texts", "weight"}  # columns of other settings
# The types of features that `datasets` 3.0 to 3.6 knows.
FEATURES_OF_3 = {"Value", "ClassLabel", "Sequence", "LargeList", "Image", "Audio", "Array2D", "Array3D"}


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
    import webdataset as wds

    urls = [str(path) for path in sorted((run / "export" / "webdataset").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [row.key for row in index]
    assert [s["jpg"] for s in samples] == read_originals(run, index)
    assert [s["txt"].decode() for s in samples] == [join_lines(row.caption) for row in index]
    assert all({*json.loads(s["json"]), *OPTIONAL} == set(column_names(Exported)) for s in samples)
    decoded = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json")
    assert [image.size for image, _, _ in decoded] == [(row.width, row.height) for row in index]


@pytest.mark.slow
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


@pytest.mark.slow
def test_shards_without_chosen_captions_have_no_files_and_the_index_lists_the_others(tmp_path: Path) -> None:
    import wids

    photos = corpus(tmp_path / "photos", ["jpg"] * 8)
    parts = sections(photos, source={"shard_size": 3}, filter={"rules": {"first": "key NOT LIKE '000001%'"}})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    folder = run / "export" / "webdataset"
    assert sorted(path.name for path in folder.glob("*.tar")) == ["00000.tar", "00002.tar"]
    assert len(list((run / "export" / "index").glob("*.parquet"))) == 3
    shards = json.loads((folder / "index.json").read_text())["shardlist"]
    assert [(shard["url"], shard["nsamples"]) for shard in shards] == [("00000.tar", 3), ("00002.tar", 2)]
    assert all(shard["filesize"] == (folder / shard["url"]).stat().st_size for shard in shards)
    loaded = wids.ShardListDataset(str(folder / "index.json"), cache_dir=str(tmp_path / "cache"))
    keys = [f"{shard:06d}{index:06d}" for shard, num in ((0, 3), (2, 2)) for index in range(num)]
    assert [loaded[i]["__key__"] for i in range(len(loaded))] == keys


@pytest.mark.slow
def test_image_extension_can_be_the_originals(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png", "webp"])
    parts = sections(photos, export={"image_extension": "original"}, filter={"rules": {}})
    run = begin(tmp_path / "run", parts)
    make(run)
    names = tarfile.open(run / "export" / "webdataset" / "00000.tar").getnames()
    assert [name.split(".")[1] for name in names] == ["jpg", "json", "txt", "png", "json", "txt", "webp", "json", "txt"]


def exported(**changes: Any) -> Exported:
    values: dict[str, Any] = {"key": "000000000000", "source_key": "a.jpg", "sha256": "0" * 64, "caption": "One."}
    values |= {"alt_text": "", "caption_pass": "dense", "candidate": 0, "model": "m", "revision": "", "format": "jpeg"}
    values |= {"width": 4, "height": 3, "num_bytes": 3, "metadata": "{}", "scores": (NamedScore(name="s", value=0.5),)}
    return Exported(**{**values, **changes})


def test_texts_in_text_files_are_one_line_and_rows_keep_their_breaks(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    caption = "A red  square.\r\n\r\n It is\tlarge.\u2028The end. \n"
    sample = ExportSample(row=exported(caption=caption), data=b"jpg")
    for form in (webdataset, parquet):
        writer = form.open(tmp_path, 0, tmp_path / "work")
        writer.add(sample, "jpg")
        writer.commit()
    with tarfile.open(tmp_path / "export" / "webdataset" / "00000.tar") as tar:
        members = {name.partition(".")[2]: tar.extractfile(name).read().decode() for name in tar.getnames()}  # type: ignore[union-attr]
    assert members["txt"] == "A red  square. It is\tlarge. The end."
    assert json.loads(members["json"])["caption"] == caption
    assert pq.read_table(tmp_path / "export" / "parquet" / "00000.parquet")["caption"].to_pylist() == [caption]


@pytest.mark.parametrize("text", ["", " a  b ", "a b", "a.\tB."])
def test_a_text_without_breaks_stays_as_it_is(text: str) -> None:
    assert join_lines(text) == text


def test_features_are_described_as_datasets_3_and_later_read_them(run: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    path = next((run / "export" / "parquet").glob("*.parquet"))
    schema = pq.read_schema(path)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    pending, types = [features], set()
    while pending:
        match pending.pop():
            case {"_type": str(name), **rest}:
                types.add(name)
                pending += [value for value in rest.values() if not isinstance(value, str)]
            case dict(struct):
                pending += struct.values()
            case [one]:  # both read a list of one feature as a list of it
                pending.append(one)
            case other:
                raise AssertionError(other)
    assert types == {"Image", "Value"} <= FEATURES_OF_3
    assert list(datasets.Features.from_dict(features)) == schema.names
    assert datasets.Features.from_dict(features).arrow_schema.field("scores").type.value_type.names == ["name", "value"]


def turned(folder: Path) -> Path:
    """Pictures of each orientation, upright 48 x 32."""
    folder.mkdir()
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 24, 16))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a reader undoes
    for orientation, method in stored.items():
        picture = upright if method is None else upright.transpose(Image.Transpose(method))
        kind = "PNG" if orientation == 8 else "JPEG"
        (folder / f"{orientation}.{kind.lower()}").write_bytes(set_orientation(picture, orientation, kind))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("upright", [False, True])
def test_pictures_on_their_side_are_exported_with_their_orientation_or_upright(tmp_path: Path, upright: bool) -> None:
    photos = turned(tmp_path / "photos")
    parts = sections(photos, export={"upright": upright} if upright else {}, filter={"rules": {}})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    (row_file,) = (run / "export" / "index").glob("*.parquet")
    rows = {row.key: row for row in tables.read_rows(row_file, Exported)}
    images = dict(webdataset.read_images(run / "export" / "webdataset" / "00000.tar"))
    assert images == dict(parquet.read_images(run / "export" / "parquet" / "00000.parquet"))
    assert [row.orientation for row in rows.values()] == ([1] * 8 if upright else [*range(1, 9)])
    for key, data in images.items():
        row, original = rows[key], (photos / rows[key].source_key).read_bytes()
        found, was = probe(data), probe(original)
        assert (row.format, row.num_bytes, row.orientation) == (found.format, len(data), found.orientation)
        assert (row.width, row.height) == (found.width, found.height) == (48, 32)
        assert row.sha256 == was.sha256
        assert (row.written_sha256 or row.sha256) == found.sha256
        assert (data != original) == (row.reencoded != "") == (upright and was.orientation != 1)
        if upright:
            picture = Image.open(BytesIO(data))  # as a reader that ignores EXIF sees it
            assert picture.size == (48, 32)
            assert picture.convert("RGB").getpixel((4, 4))[1] < 60 < 200 < picture.convert("RGB").getpixel((40, 28))[1]
    samples = [json.loads(line) for line in read_members(run / "export" / "webdataset" / "00000.tar", "json")]
    assert all((column in sample) == upright for sample in samples for column in ("reencoded", "written_sha256"))
    assert recap("verify", "--run", run).stdout == ""


def read_members(tar: Path, extension: str) -> list[bytes]:
    with tarfile.open(tar) as file:
        return [file.extractfile(name).read() for name in file.getnames() if name.endswith(extension)]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_training_set_without_samples_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"]), filter={"rules": {"none": "false"}})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    assert "no caption was kept" in capsys.readouterr().err
    assert "**This data set is empty: no caption was kept.**" in (run / "export" / "README.md").read_text()


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


@pytest.mark.slow
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
