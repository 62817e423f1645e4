"""The contract of every source, and the particulars of each."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import plugins
from pipeline.commands.init import guess_source
from pipeline.errors import ConfigError, MachineError, UserError
from pipeline.records import Raw
from pipeline.sections import stamped
from pipeline.sources import _columns, _parquet, folder, hf, img2dataset, parquet, webdataset
from pipeline.storage import plan
from tests.support.serving import serve_folder


def read_photo(package: str, path: str) -> bytes:
    """The bytes of a picture that ships with a package, found without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_bytes()


PHOTOS = {name: read_photo("sklearn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")} | {
    name: read_photo("skimage", f"data/{name}")
    for name in ("rocket.jpg", "cell.png", "chelsea.png", "text.png", "multipage.tif", "no_time_for_that_tiny.gif")
}
IMAGES = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
KINDS = ", ".join(plugins.list_names("pipeline.sources"))
Maker = Callable[[Path, int], Any]


def list_samples(num: int) -> list[tuple[str, bytes, str]]:
    """Numbered photographs with a text about each: name, bytes, alt text."""
    names = sorted(PHOTOS)
    chosen = [names[index % len(names)] for index in range(num)]
    return [
        (f"{index:04d}.{name.split('.')[1]}", PHOTOS[name], f"{index}: {name}") for index, name in enumerate(chosen)
    ]


def make_folder(root: Path, num: int) -> folder.Config:
    root.mkdir(exist_ok=True)
    for name, data, alt_text in list_samples(num):
        (root / name).write_bytes(data)
        (root / f"{name[:4]}.txt").write_text(alt_text)
    return folder.Config(path=str(root))


def make_webdataset(root: Path, num: int) -> webdataset.Config:
    import webdataset as wds

    root.mkdir(exist_ok=True)
    for shard in range(-(-num // 3)):
        with wds.TarWriter(str(root / f"{shard:05d}.tar"), mtime=0) as writer:
            for name, data, alt_text in list_samples(num)[3 * shard : 3 * shard + 3]:
                writer.write({"__key__": name[:4], name[5:]: data, "txt": alt_text, "json": {"number": int(name[:4])}})
    return webdataset.Config(path=str(root))


def make_parquet(root: Path, num: int) -> parquet.Config:
    """In the layout that `datasets` writes, two rows in a group."""
    root.mkdir(exist_ok=True)
    for first in range(0, num, 5):
        rows = list_samples(num)[first : first + 5]
        images = [{"bytes": data, "path": name} for name, data, _ in rows]
        table = pa.table({"image": images, "text": [text for *_, text in rows], "n": range(len(rows))})
        pq.write_table(table, root / f"{first:05d}.parquet", row_group_size=2)
    return parquet.Config(path=str(root))


def make_hf(root: Path, num: int) -> hf.Config:
    import datasets

    rows = {
        "image": [{"bytes": data, "path": name} for name, data, _ in list_samples(num)],
        "text": [text for *_, text in list_samples(num)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root)
    return hf.Config(path=str(root))


def make_img2dataset(root: Path, num: int) -> img2dataset.Config:
    """The files that img2dataset writes; `TestImg2dataset` runs it for real."""
    make_webdataset(root, num)
    for first in range(0, num, 3):
        columns = ("key", "caption", "status", "error_message")
        rows = [(name[:4], text, "success", None) for name, _, text in list_samples(num)[first : first + 3]]
        table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
        pq.write_table(table, root / f"{first // 3:05d}.parquet")
        (root / f"{first // 3:05d}_stats.json").write_text("{}")
    return img2dataset.Config(path=str(root))


SOURCES: dict[ModuleType, Maker] = {
    folder: make_folder,
    webdataset: make_webdataset,
    parquet: make_parquet,
    hf: make_hf,
    img2dataset: make_img2dataset,
}


@pytest.fixture(params=SOURCES, ids=lambda module: module.__name__.rpartition(".")[2])
def source(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def read_all(source: ModuleType, config: Any) -> list[Raw]:
    return [raw for piece in source.pieces(config) for raw in source.read(piece, config)]


class TestEverySource:
    @pytest.mark.slow
    def test_yields_every_image_once_in_order_with_its_bytes_and_text(self, source: ModuleType, tmp_path: Path) -> None:
        raws = read_all(source, SOURCES[source](tmp_path / "corpus", 8))
        assert [(raw.data, raw.alt_text, raw.error) for raw in raws] == [
            (b, text, None) for _, b, text in list_samples(8)
        ]
        assert len({raw.source_key for raw in raws}) == 8

    @pytest.mark.slow
    def test_a_piece_has_its_length_or_none(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 8)
        for piece in source.pieces(config):
            assert piece.num_samples in (None, len(list(source.read(piece, config))))

    @pytest.mark.slow
    def test_what_only_reading_tells_can_be_counted(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 8)
        for piece in source.pieces(config):
            if piece.num_samples is None:
                assert source.count(piece, config) == len(list(source.read(piece, config)))

    def test_reads_the_same_samples_twice(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 8)
        assert list(source.pieces(config)) == list(source.pieces(config))
        assert read_all(source, config) == read_all(source, config)

    def test_a_range_of_a_piece_is_a_slice_of_its_samples(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 6)
        for piece in source.pieces(config):
            whole = list(source.read(piece, config))
            for start in range(len(whole) + 1):
                for stop in range(start, len(whole) + 1):
                    part = replace(piece, start=piece.start + start, stop=piece.start + stop)
                    assert list(source.read(part, config)) == whole[start:stop]

    def test_growth_moves_no_planned_sample(self, source: ModuleType, tmp_path: Path) -> None:
        """A plan of nine samples is extended to fourteen: the nine keep their places and contents."""
        config, file = SOURCES[source](tmp_path / "corpus", 9), tmp_path / "plan.parquet"
        plan.write_plan(file, source.pieces(config), shard_size=3)
        before = read_planned(source, file, config)
        assert len(before) == 9
        plan.write_plan(file, source.pieces(SOURCES[source](tmp_path / "corpus", 14)), shard_size=3)
        if source is parquet:  # it cannot grow without being rewritten
            config = replace(config, allow_rewritten=True)
        after = read_planned(source, file, config)
        assert after[:9] == before
        assert sorted(raw.alt_text or "" for raw in after) == sorted(text for _, _, text in list_samples(14))

    def test_referenced_bytes_are_in_the_file_at_the_offset(self, source: ModuleType, tmp_path: Path) -> None:
        for raw in read_all(source, SOURCES[source](tmp_path / "corpus", 8)):
            assert (raw.file is None) == (raw.offset is None)
            if raw.file is not None and raw.offset is not None and raw.data is not None:
                assert Path(raw.file).read_bytes()[raw.offset :].startswith(raw.data)

    def test_metadata_is_a_json_object(self, source: ModuleType, tmp_path: Path) -> None:
        for raw in read_all(source, SOURCES[source](tmp_path / "corpus", 8)):
            assert isinstance(json.loads(raw.metadata), dict)

    def test_a_missing_path_is_named(self, source: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"source\.path: .*nowhere"):
            list(source.pieces(source.Config(path=str(tmp_path / "nowhere"))))

    def test_claims_its_own_corpus_before_less_specific_sources(self, source: ModuleType, tmp_path: Path) -> None:
        config, name = SOURCES[source](tmp_path / "corpus", 4), source.__name__.rpartition(".")[2]
        assert source.claims(config.path)
        assert guess_source(config.path) == {"kind": name, "path": config.path}

    def test_claims_no_unknown_file(self, source: ModuleType, tmp_path: Path) -> None:
        for path in (tmp_path / "notes.txt", tmp_path / "photo.jpg"):
            path.touch()
            assert not source.claims(str(path))


class TestClaims:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("scenes", "scenes"),
            ("hf:nlphuji/flickr30k", "hf"),
            ("/photos/{000..099}.tar", "webdataset"),
            ("https://host/a.tar.gz?sig=x", "webdataset"),
            ("s3://bucket/*/*.tgz", "webdataset"),
            ("https://host/a.parquet", "parquet"),
            ("/tables/*.pq", "parquet"),
            ("https://host/a.zip", None),
            ("file:///photos/a.jpg", None),
        ],
    )
    def test_a_name_is_claimed_by_its_ending(self, path: str, kind: str | None) -> None:
        names = plugins.list_names("pipeline.sources")
        assert [n for n in names if plugins.load("pipeline.sources", n).claims(path)] == [kind] * (kind is not None)

    def test_a_glob_or_remote_folder_is_claimed_by_its_files(self, tmp_path: Path) -> None:
        import fsspec

        write(tmp_path, {"tars/README": "", "tars/a.tar": "", "tables/a.pq": "", "texts/a.txt": ""})
        assert guess_source(f"{tmp_path}/tars/*")["kind"] == "webdataset"
        assert guess_source(f"{tmp_path}/tables/*")["kind"] == "parquet"
        fsspec.filesystem("memory").pipe("/claimed/deep/a.tar", b"")
        assert guess_source("memory://claimed") == {"kind": "webdataset", "path": "memory://claimed"}

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("photo.JPG", "is one image; write its folder"),
            ("photos.zip", "is a ZIP archive, which no source reads; unpack it"),
            ("urls.csv", r"is a table of texts; .* as metadata\.csv and the column file_name"),
            ("urls.jsonl", r"is a table of texts; .* as metadata\.jsonl"),
            ("unknown", f"is not recognised as any source; choose one with --kind: {KINDS}$"),
            ("*", f"is not recognised as any source; choose one with --kind: {KINDS}$"),
        ],
    )
    def test_an_unclaimed_path_is_refused_with_advice(self, tmp_path: Path, name: str, message: str) -> None:
        write(tmp_path, dict.fromkeys(("photo.JPG", "photos.zip", "urls.csv", "urls.jsonl", "unknown"), ""))
        with pytest.raises(UserError, match=f"--source .*: {message}"):
            guess_source(str(tmp_path / name))
        assert guess_source(str(tmp_path / name), kind="webdataset")["kind"] == "webdataset"


def read_planned(source: ModuleType, file: Path, config: Any) -> list[Raw]:
    frozen, shards = plan.Plan.load(file)
    return [raw for shard in shards for piece in frozen.pieces(shard) for raw in source.read(piece, config)]


def write(root: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def write_metadata(path: Path, rows: list[dict[str, str]]) -> None:
    import pandas

    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path, index=False)


class TestFolder:
    def read(self, root: Path, **keys: Any) -> dict[str, Raw]:
        raws = read_all(folder, folder.Config(path=str(root), **keys))
        assert len({raw.source_key for raw in raws}) == len(raws)
        return {raw.source_key: raw for raw in raws}

    def test_every_file_is_an_input_except_sidecars_metadata_and_hidden_ones(self, tmp_path: Path) -> None:
        inputs = ["a.jpg", "alone.txt", "b/c.PNG", "b/c.d/e.webp", "misnamed.dat", "no_extension", "notes.json"]
        others = ["a.txt", "a.json", "b/c.txt", "b/c.PNG.json", ".x.jpg", ".git/x.jpg", "b/metadata.csv", "b/.x/y.jpg"]
        write(tmp_path, dict.fromkeys(inputs + others, "file_name") | {"empty.jpg": b""})
        raws = self.read(tmp_path)
        assert sorted(raws) == sorted([*inputs, "empty.jpg"])
        assert raws["empty.jpg"].data == b""
        assert all(raw.error is None for raw in raws.values())

    def test_alt_text_and_metadata_come_from_sidecars(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.jpg": "", "a.txt": "\ufeffa cat\n", "a.json": '{"text": "a cat", "n": NaN, "by": "é"}'})
        write(tmp_path, {"b.jpg": "", "b.json": '{"TEXT": "a dog", "caption": ["a", "b"]}'})
        write(tmp_path, {"c.jpg": "", "c.json": "[1"})
        raws = self.read(tmp_path)
        assert (raws["a.jpg"].alt_text, raws["a.jpg"].metadata) == ("a cat", '{"n": null, "by": "é"}')
        assert (raws["b.jpg"].alt_text, raws["b.jpg"].metadata) == ("a", '{"TEXT": "a dog", "caption": ["a", "b"]}')
        assert (raws["c.jpg"].alt_text, raws["c.jpg"].metadata) == (None, '{"json": "[1"}')
        assert self.read(tmp_path, alt_text="TEXT")["b.jpg"].alt_text == "a dog"

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
    def test_metadata_files_are_read_as_in_an_imagefolder(self, tmp_path: Path, ending: str) -> None:
        rows = [
            {"file_name": "one.jpg", "text": 'one, "quoted"\nand a second line', "size": "1"},
            {"file_name": "./deep/two.jpg", "text": "二", "size": "2"},
            {"file_name": "gone.jpg", "text": "", "size": "3"},
        ]
        write(tmp_path, {"train/one.jpg": b"1", "train/deep/two.jpg": b"2", "train/three.jpg": b"3", "one.jpg": b"4"})
        write_metadata(tmp_path / f"train/metadata.{ending}", rows)
        raws = self.read(tmp_path)
        assert sorted(raws) == ["one.jpg", "train/deep/two.jpg", "train/one.jpg", "train/three.jpg"]
        assert raws["train/one.jpg"].alt_text == rows[0]["text"]
        assert raws["train/one.jpg"].metadata == '{"size": "1"}'
        assert raws["train/deep/two.jpg"].alt_text == "二"
        assert raws["one.jpg"].alt_text is raws["train/three.jpg"].alt_text is None

    def test_the_nearest_metadata_file_with_an_images_row_is_used(self, tmp_path: Path) -> None:
        write(tmp_path, {"a/x.jpg": "", "a/y.jpg": ""})
        write_metadata(tmp_path / "metadata.csv", [{"file_name": f"a/{name}.jpg", "text": "far"} for name in "xy"])
        write_metadata(tmp_path / "a/metadata.csv", [{"file_name": "x.jpg", "text": "near"}])
        raws = self.read(tmp_path)
        assert (raws["a/x.jpg"].alt_text, raws["a/y.jpg"].alt_text) == ("near", "far")

    def test_a_changed_metadata_file_is_reread(self, tmp_path: Path) -> None:
        for text in ("before", "and after"):
            write(tmp_path, {"a.jpg": "", "metadata.csv": f"file_name,text\na.jpg,{text}\n"})
            assert self.read(tmp_path)["a.jpg"].alt_text == text

    def test_file_names_may_be_in_any_script_or_not_utf8(self, tmp_path: Path) -> None:
        names = ["קיץ/חתול 🐈.jpg", "дом.jpg", "a\nb.jpg", r"real\xff.jpg", r"back\slash.jpg"]
        write(tmp_path, {name: name for name in names})
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/raw\xff.jpg")).write_bytes(b"bytes")
        rows = [{"file_name": os.path.normpath(name), "text": f"about {name}"} for name in (*names, r"raw\xff.jpg")]
        write_metadata(tmp_path / "metadata.csv", rows)
        raws = self.read(tmp_path)
        assert {raw.data for raw in raws.values()} == {name.encode() for name in names} | {b"bytes"}
        assert all(raw.alt_text == f"about {raw.data.decode()}" for raw in raws.values() if raw.data != b"bytes")  # type: ignore[union-attr]
        assert raws[r"raw\xff.jpg"].alt_text == r"about raw\xff.jpg"
        assert raws[r"raw\xff.jpg"].data == b"bytes"
        assert raws[r"real\x5cxff.jpg"].data == rb"real\xff.jpg"
        assert all(raw.source_key.encode() for raw in raws.values())

    def test_links_out_of_the_folder_are_not_followed(self, tmp_path: Path) -> None:
        root = tmp_path / "corpus"
        write(tmp_path, {"corpus/a.jpg": b"a", "secret/b.jpg": b"b", "secret.txt": "secret"})
        links = {"in.jpg": "a.jpg", "out.jpg": "../secret/b.jpg", "far.jpg": str(tmp_path / "secret/b.jpg")}
        links |= {"a.txt": "../secret.txt", "broken.jpg": "nothing", "round": ".", "loop.jpg": "loop.jpg"}
        for name, target in links.items():
            (root / name).symlink_to(target)
        os.mkfifo(root / "pipe.jpg")
        raws = self.read(root)
        assert sorted(raws) == sorted({*links, "a.jpg", "pipe.jpg"} - {"a.txt"})
        assert {name: raw.data for name, raw in raws.items() if raw.error is None} == {"a.jpg": b"a", "in.jpg": b"a"}
        advice = "it leads out of the folder; set source.follow_links = true to allow it"
        assert (raws["a.jpg"].alt_text, json.loads(raws["a.jpg"].metadata)) == (
            None,
            {"sidecar_error": f"a.txt: {advice}"},
        )
        assert raws["out.jpg"].error == raws["far.jpg"].error == advice
        assert raws["round"].error == "it is a folder"
        assert raws["pipe.jpg"].error == "it is not a regular file"

    def test_one_rule_allows_links_out_of_the_folder_for_all_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = "file_name,text\na.jpg,in the table\n"
        write(
            tmp_path,
            {"blobs/1": b"jpeg", "blobs/2": table, "blobs/3": "aside", "far/b.jpg": b"b", "root/own.jpg": b"o"},
        )
        links = {"a.jpg": "../blobs/1", "metadata.csv": "../blobs/2", "own.txt": "../blobs/3", "far": "../far"}
        for name, target in (links | {"round": ".", "loop.jpg": "loop.jpg"}).items():
            (tmp_path / "root" / name).symlink_to(target)
        raws = self.read(tmp_path / "root")
        assert {name for name, raw in raws.items() if raw.error is None} == {"own.jpg"}
        assert {raw.alt_text for raw in raws.values()} == {None}
        assert "1 folders and metadata files are passed over" in (message := capsys.readouterr().err)
        assert "'metadata.csv'" in message
        raws = self.read(tmp_path / "root", follow_links=True)
        assert {name: (raw.data, raw.alt_text) for name, raw in raws.items()} == {
            "a.jpg": (b"jpeg", "in the table"),
            "own.jpg": (b"o", "aside"),
            "far/b.jpg": (b"b", None),
            "loop.jpg": (None, None),
        }
        assert "1 folders and metadata files are passed over" in (message := capsys.readouterr().err)
        assert "'round/'" in message

    def test_columns_that_may_be_alt_text_are_named_where_none_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(tmp_path, {"a.jpg": b"a", "metadata.csv": "file_name,Caption,by\na.jpg,a cat,me\n"})
        self.read(tmp_path)
        assert "so no alt text is read; to read some, set source.alt_text to one of Caption, by" in (
            capsys.readouterr().err
        )
        assert self.read(tmp_path, alt_text="Caption")["a.jpg"].alt_text == "a cat"
        assert not capsys.readouterr().err

    def test_excluded_files_are_no_inputs(self, tmp_path: Path) -> None:
        write(tmp_path, dict.fromkeys(["a.jpg", "a.npz", "b/c.jpg", "b/c.npz", "masks/a.png", "b/Thumbs.db"], ""))
        assert list(self.read(tmp_path, exclude=("*.npz", "masks/*", "Thumbs.db"))) == ["a.jpg", "b/c.jpg"]

    def test_new_keys_are_in_the_fingerprint_only_when_they_are_set(self) -> None:
        assert stamped(folder.Config(path="x", exclude=("*.npz",))) == {"alt_text": ""}
        assert stamped(folder.Config(path="x", follow_links=True)) == {"alt_text": "", "follow_links": True}

    def test_a_missing_file_is_a_row_but_a_missing_folder_raises(self, tmp_path: Path) -> None:
        config = make_folder(tmp_path / "corpus", 1)
        (piece,) = folder.pieces(config)
        (tmp_path / "corpus" / piece.file).unlink()
        (raw,) = folder.read(piece, config)
        assert raw.data is None
        assert raw.error == "it cannot be read: No such file or directory"
        (tmp_path / "corpus").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            list(folder.read(piece, config))

    def test_metadata_without_file_names_or_the_alt_text_column_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, {"metadata.csv": "image,text\na.jpg,words\n", "a.jpg": ""})
        with pytest.raises(ConfigError, match=r"metadata\.csv: has no column 'file_name'; it has image, text"):
            self.read(tmp_path)
        write(tmp_path, {"metadata.csv": "file_name,text\na.jpg,words\n"})
        with pytest.raises(ConfigError, match=r"source\.alt_text: .* column 'txet'; they have file_name, text"):
            self.read(tmp_path, alt_text="txet")
        assert self.read(tmp_path, alt_text="text")["a.jpg"].alt_text == "words"

    def test_sidecars_may_be_spelled_in_another_case(self, tmp_path: Path) -> None:
        write(tmp_path, {f"{name}.JPG": "" for name in ("D1", "D2", "D3", "D4", "D5", "d5")})
        write(tmp_path, {"D1.TXT": "1", "D2.JSON": '{"caption": "2"}', "d3.txt": "3", "D4.txt": "4", "D4.TXT": "other"})
        write(tmp_path, {"D5.Txt": "large", "d5.txt": "small", "notes.TXT": "no image's"})
        raws = self.read(tmp_path)
        assert {name: raw.alt_text for name, raw in raws.items()} == {
            "D1.JPG": "1",
            "D2.JPG": "2",
            "D3.JPG": "3",
            "D4.JPG": "4",
            "D5.JPG": "large",
            "d5.JPG": "small",
            "notes.TXT": None,
        }

    @pytest.mark.parametrize(("image", "text"), [("NFD", "NFC"), ("NFC", "NFD")])
    def test_sidecars_may_compose_accents_in_another_way(self, tmp_path: Path, image: str, text: str) -> None:
        name, other = (unicodedata.normalize(cast(Any, form), "café") for form in (image, text))
        write(tmp_path, {f"{name}.jpg": "", f"{other}.txt": "words"})
        assert {raw.alt_text for raw in self.read(tmp_path).values()} == {"words"}

    @pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
    def test_utf16_without_a_mark_is_recognised(self, tmp_path: Path, codec: str) -> None:
        write(tmp_path, {"a.jpg": "", "a.txt": "A dog’s bowl".encode(codec)})
        assert self.read(tmp_path)["a.jpg"].alt_text == "A dog’s bowl"

    @pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
    def test_texts_are_decoded_by_mark_then_as_utf8_then_as_cp1252(self, tmp_path: Path, codec: str) -> None:
        text = "café “smart” – a dog’s bowl"
        mark = b"\xfe\xff" if codec == "utf-16-be" else b""
        table = f"file_name,text\nc.jpg,{text}\nplain.jpg,plain\n"
        write(tmp_path, {"a.jpg": "", "b.jpg": "", "csv/c.jpg": "", "csv/plain.jpg": "", "jsonl/c.jpg": ""})
        write(tmp_path, {"a.txt": mark + text.encode(codec), "csv/metadata.csv": mark + table.encode(codec)})
        lines = json.dumps({"file_name": "c.jpg", "text": text}, ensure_ascii=False)
        write(tmp_path, {"b.json": mark + json.dumps({"caption": text}, ensure_ascii=False).encode(codec)})
        write(tmp_path, {"jsonl/metadata.jsonl": mark + lines.encode(codec)})
        raws = self.read(tmp_path)
        assert raws.pop("csv/plain.jpg").metadata == "{}"
        flag = '{"text_encoding": "cp1252"}' if codec == "cp1252" else "{}"
        assert {(raw.alt_text, raw.metadata) for raw in raws.values()} == {(text, flag)}

    def test_metadata_rows_find_files_whose_names_are_written_another_way(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(tmp_path, dict.fromkeys(("sub/a.jpg", "B.JPG", "c.jpg", "é.jpg", "x.jpg", "X.jpg", "y.jpg"), ""))
        names = ["sub\\a.jpg", "b.jpg", " c.jpg", "e\u0301.jpg", "x.jpg", "Y.jpg", "y.JPG", "gone.jpg", "x.jpg"]
        write_metadata(tmp_path / "metadata.csv", [{"file_name": name, "text": name} for name in names])
        assert {name: raw.alt_text for name, raw in self.read(tmp_path).items()} == {
            "sub/a.jpg": "sub\\a.jpg",
            "B.JPG": "b.jpg",
            "c.jpg": " c.jpg",
            "é.jpg": "e\u0301.jpg",
            "x.jpg": "x.jpg",
            "X.jpg": None,
            "y.jpg": None,  # x.jpg's row is its own; two rows may be y.jpg's
        }
        assert capsys.readouterr().err == (
            "metadata.csv: 3 of 9 rows name no image in the folder: 'Y.jpg', 'gone.jpg', 'y.JPG'\n"
        )

    @pytest.mark.slow
    def test_reads_an_imagefolder_as_datasets_does(self, tmp_path: Path) -> None:
        import datasets

        write(tmp_path / "corpus", {name: data for name, data, _ in list_samples(5)})
        rows = [{"file_name": name, "caption": text} for name, _, text in list_samples(5)]
        write_metadata(tmp_path / "corpus/metadata.jsonl", rows)
        theirs = datasets.load_dataset("imagefolder", data_dir=tmp_path / "corpus", cache_dir=str(tmp_path / "cache"))
        theirs = theirs["train"].cast_column("image", datasets.Image(decode=False))
        expected = [(Path(row["image"]["path"]).name, row["caption"]) for row in theirs]
        assert [(raw.source_key, raw.alt_text) for raw in self.read(tmp_path / "corpus").values()] == expected


class TestParquet:
    def read(self, path: Path, **keys: Any) -> list[Raw]:
        return read_all(parquet, parquet.Config(path=str(path), **keys))

    def write(self, path: Path, columns: dict[str, Any], **options: Any) -> Path:
        pq.write_table(pa.table(columns), path, **options)
        return path

    def test_reads_images_as_bytes_or_in_the_layout_of_datasets(self, tmp_path: Path) -> None:
        for kind in (pa.binary(), pa.large_binary()):
            self.write(tmp_path / f"{kind}.parquet", {"jpg": pa.array([b"1", b"2"], kind), "TEXT": ["one", "two"]})
        self.write(tmp_path / "struct.parquet", {"x": [{"bytes": b"1"}, {"bytes": b"2"}], "caption": ["one", "two"]})
        raws = self.read(tmp_path)
        assert [(raw.data, raw.alt_text) for raw in raws] == [(b"1", "one"), (b"2", "two")] * 3
        assert [raw.source_key for raw in raws[:2]] == ["binary.parquet:0", "binary.parquet:1"]

    @pytest.mark.parametrize(
        ("columns", "keys"),
        [
            ({"id": [7, None], "uid": ["a", "b"]}, ["a", "b"]),
            ({"id": [7, None]}, ["7", "name.jpg"]),
            ({"__key__": ["k", ""], "key": ["x", "y"]}, ["k", "name.jpg"]),
            ({}, ["p/1.jpg", "name.jpg"]),
        ],
    )
    def test_source_keys_come_from_the_corpus(self, tmp_path: Path, columns: Any, keys: list[str]) -> None:
        images = [{"bytes": b"1", "path": "p/1.jpg"}, {"bytes": b"2", "path": "name.jpg"}]
        file = self.write(tmp_path / "a.parquet", {"image": images, **columns})
        assert [raw.source_key for raw in self.read(file)] == keys

    def test_other_columns_become_metadata_where_json_can_hold_them(self, tmp_path: Path) -> None:
        columns = {
            "image": pa.array([b"1"]),
            "thumbnail": pa.array([b"2" * 100_000]),
            "hash": pa.array([b"\x01\xff"], pa.binary(2)),
            "score": [float("nan")],
            "when": [datetime(2024, 2, 29, tzinfo=UTC)],
            "tags": [[1.5, float("inf")]],
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "price": [Decimal("1.10")],
        }
        (raw,) = self.read(self.write(tmp_path / "a.parquet", columns), image="image")
        assert json.loads(raw.metadata) == {
            "hash": "01ff",
            "score": None,
            "when": "2024-02-29T00:00:00+00:00",
            "tags": [1.5, None],
            "map": [["a", 1]],
            "price": "1.10",
        }

    def test_columns_that_may_be_alt_text_are_named_where_none_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raws = self.read(self.write(tmp_path / "a.parquet", {"image": [b"a"], "Description": ["a cat"], "size": [3]}))
        assert raws[0].alt_text is None
        assert "no column caption, text, TEXT or txt" in (message := capsys.readouterr().err)
        assert message.endswith("to one of Description\n")

    def test_images_may_be_stored_once_and_referred_to(self, tmp_path: Path) -> None:
        images = pa.array([b"one", b"two", b"one"]).dictionary_encode()
        raws = self.read(self.write(tmp_path / "a.parquet", {"image": images}))
        assert [raw.data for raw in raws] == [b"one", b"two", b"one"]

    def test_nulls_and_wrong_types_are_row_errors(self, tmp_path: Path) -> None:
        images = [{"bytes": b"1", "path": None}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "a"}]
        self.write(tmp_path / "a.parquet", {"image": images, "text": ["a", "b", None, "d"]})
        self.write(tmp_path / "b.parquet", {"image": ["a string", "another"], "text": [1, 2]})
        self.write(tmp_path / "c.parquet", {"picture": [b"1"]})
        self.write(tmp_path / "d.parquet", {"image": pa.nulls(2)})
        raws = self.read(tmp_path, image="image")
        assert [raw.data for raw in raws] == [b"1", None, None, b"", *[None] * 5]
        assert [raw.error for raw in raws] == [
            None,
            "the row has no image",
            "the row has no image",
            None,
            *["source.image: column 'image' holds string, not image files"] * 2,
            "source.image: there is no column 'image'; there are picture",
            *["the row has no image"] * 2,
        ]
        assert [raw.alt_text for raw in raws] == ["a", "b", None, "d", *[None] * 5]

    def test_text_that_is_not_utf8_loses_no_row(self, tmp_path: Path) -> None:
        bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff"]).buffers())
        raws = self.read(self.write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "text": bad}))
        assert [raw.data for raw in raws] == [b"1", b"2"]
        assert raws[0].alt_text == "fine"

    def test_paths_are_opened_below_image_root_only(self, tmp_path: Path) -> None:
        write(tmp_path, {"images/a.jpg": b"a", "secret.jpg": b"secret"})
        paths = [
            "a.jpg",
            str(tmp_path / "images/a.jpg"),
            "../secret.jpg",
            str(tmp_path / "secret.jpg"),
            "http://x/a.jpg",
        ]
        images = [{"bytes": None, "path": path} for path in paths]
        file = self.write(
            tmp_path / "a.parquet", {"image": pa.array(images, pa.struct({"bytes": "binary", "path": "string"}))}
        )
        assert [raw.data for raw in self.read(file)] == [None] * 5
        assert "set source.image_root" in (self.read(file)[0].error or "")
        raws = self.read(file, image_root=str(tmp_path / "images"))
        assert [raw.data for raw in raws] == [b"a", b"a", None, None, None]
        assert [raw.source_key for raw in raws[:2]] == ["a.jpg", "a.jpg"]
        assert [raw.error and raw.error.rpartition(": ")[2] for raw in raws[2:]] == [
            "it leads out of the folder",
            "it leads out of the folder",
            "URLs are not fetched",
        ]

    def test_texts_and_urls_may_lack_the_utf8_annotation(self, tmp_path: Path) -> None:
        columns = {"image": [b"jpeg"], "caption": ["é".encode()], "url": [b"http://x"], "hash": [b"\xff\0"]}
        pq.write_table(pa.table(columns | {"other": [bytes(10_000)], "id": [b"name"]}), tmp_path / "a.parquet")
        (raw,) = read_all(parquet, parquet.Config(path=str(tmp_path)))
        assert (raw.source_key, raw.data, raw.alt_text) == ("name", b"jpeg", "é")
        assert raw.metadata == '{"url": "http://x", "hash": "ff00"}'

    @pytest.mark.parametrize(
        ("values", "keys"),
        [
            ([b"a", b"\0\xff"], ["a", "00ff"]),
            ([1.0, 12345678901.0, 0.5, float("nan")], ["1", "12345678901", "0.5", "a.parquet:3"]),
            ([{"a": 1}], ['{"a": 1}']),
            ([["a", "b"]], ['["a", "b"]']),
        ],
    )
    def test_source_keys_are_text_whatever_their_type(self, tmp_path: Path, values: list[Any], keys: list[str]) -> None:
        pq.write_table(pa.table({"image": [b"jpeg"] * len(values), "id": values}), tmp_path / "a.parquet")
        assert [raw.source_key for raw in read_all(parquet, parquet.Config(path=str(tmp_path)))] == keys

    @pytest.mark.parametrize(
        ("column", "alt_text"),
        [
            ({"caption": ["", None, " ", "second"]}, "second"),
            ({"json": {"caption": "inside", "width": 3}}, "inside"),
            ({"json": '{"text": "inside"}'}, "inside"),
            ({"caption": "outside", "json": {"caption": "inside"}}, "outside"),
            ({"json": "[1"}, None),
        ],
    )
    def test_captions_are_found_in_lists_and_json(
        self, tmp_path: Path, column: dict[str, Any], alt_text: str | None
    ) -> None:
        columns = {name: [value] for name, value in column.items()}
        pq.write_table(pa.table({"image": [b"jpeg"]} | columns), tmp_path / "a.parquet")
        assert [raw.alt_text for raw in read_all(parquet, parquet.Config(path=str(tmp_path)))] == [alt_text]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                {"images": [[b"jpeg"]]},
                "column 'images' holds lists of images, which are not supported: write one image a row",
            ),
            (
                {"images": [[{"bytes": b"jpeg"}]], "thumbnail": [b"small"]},
                "lists of images.*; or choose one of thumbnail",
            ),
            ({"images": [[b"jpeg"]], "sha256": [b"hash"]}, "lists of images.*; or choose one of sha256"),
            ({"url": [b"http://x"], "caption": [b"text"], "content": [b"jpeg"]}, "choose one of url, caption, content"),
            ({"name": ["a"], "md5": [b"hash"]}, "no column is clearly the images'; choose one of md5"),
        ],
    )
    def test_an_uncertain_image_column_is_refused(self, tmp_path: Path, columns: Any, message: str) -> None:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=message):
            read_all(parquet, parquet.Config(path=str(tmp_path)))

    def test_members_of_local_zip_archives_are_read_below_image_root(self, tmp_path: Path) -> None:
        import zipfile

        (tmp_path / "inner").mkdir()
        for place in (tmp_path, tmp_path / "inner"):
            with zipfile.ZipFile(place / "a.zip", "w") as archive:
                archive.writestr("in/a.jpg", b"jpeg")
        (tmp_path / "inner/broken.zip").write_bytes(b"PK")
        archives = ["inner/a.zip", "a.zip", "inner/gone.zip", "inner/broken.zip"]
        paths = [f"zip://in/a.jpg::{tmp_path}/{name}" for name in archives]
        paths += [f"zip://b.jpg::{tmp_path}/inner/a.zip", "zip://a.jpg::https://host/a.zip"]
        pq.write_table(
            pa.table({"image": [{"bytes": None, "path": path} for path in paths]}, IMAGES), tmp_path / "a.pq"
        )
        config = parquet.Config(path=str(tmp_path / "a.pq"), image_root=str(tmp_path / "inner"))
        first, *others = read_all(parquet, config)
        assert first.data == b"jpeg"
        reasons = ["leads out of the folder", "No such file", "not a zip file", "no item named 'b.jpg'", "URLs are not"]
        assert [reason in (raw.error or "") for raw, reason in zip(others, reasons, strict=True)] == [True] * 5

    def test_a_broken_file_loses_only_its_broken_rows(self, tmp_path: Path) -> None:
        images = [bytes([number]) * 5000 for number in range(8)]
        file = tmp_path / "a.parquet"
        self.write(file, {"image": images}, row_group_size=2, compression="none", write_page_checksum=True)
        whole = bytearray(file.read_bytes())
        at = whole.index(images[3])
        whole[at] ^= 1
        file.write_bytes(whole)
        (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
        raws = self.read(tmp_path)
        assert [raw.data for raw in raws] == [*images[:2], None, None, *images[4:], None]
        assert all((raw.error is None) != (raw.data is None) for raw in raws)
        assert "cannot be read" in (raws[-1].error or "")

    @pytest.mark.parametrize("num", [3, 5, 8])
    def test_a_file_rewritten_since_it_was_planned_is_refused(self, tmp_path: Path, num: int) -> None:
        config = make_parquet(tmp_path / "corpus", 5)
        (piece,) = parquet.pieces(config)
        assert len(list(parquet.read(piece, config))) == 5
        file = Path(parquet.place(piece.file, config))
        make_parquet(tmp_path / "corpus", num)
        table = pq.read_table(file)
        pq.write_table(table.take(list(reversed(range(table.num_rows)))), file, compression="gzip")
        part = replace(piece, start=1, stop=2)
        with pytest.raises(MachineError, match=r"rewritten since it was planned: .*source.allow_rewritten = true"):
            next(parquet.read(part, config))
        assert len(list(parquet.read(part, replace(config, allow_rewritten=True)))) == 1

    def test_a_file_that_became_shorter_keeps_its_planned_rows(self, tmp_path: Path) -> None:
        config = make_parquet(tmp_path / "corpus", 5)
        (piece,) = parquet.pieces(config)
        make_parquet(tmp_path / "corpus", 3)
        raws = list(parquet.read(piece, replace(config, allow_rewritten=True)))
        assert [raw.error for raw in raws] == [None] * 3 + ["the file now has 3 rows"] * 2
        num_bytes = Path(parquet.place(piece.file, config)).stat().st_size
        with pytest.raises(MachineError, match="it has 3 rows and had at least 5"):
            next(parquet.read(replace(piece, num_bytes=num_bytes), config))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"image": "img"}, r"source\.image: there is no column 'img'; there are a, b, text$"),
            ({"image": "text"}, r"source\.image: column 'text' holds string, not image files"),
            ({}, r"source\.image: several columns may hold the images; choose one of a, b$"),
            ({"image": "a", "alt_text": "alt"}, r"source\.alt_text: there is no column 'alt'; there are a, b, text$"),
            ({"image": "a", "source_key": "k"}, r"source\.source_key: there is no column 'k'; there are a, b, text$"),
        ],
    )
    def test_missing_columns_are_named(self, tmp_path: Path, keys: Any, message: str) -> None:
        file = self.write(tmp_path / "a.parquet", {"a": [b"1"], "b": [b"2"], "text": ["words"]})
        with pytest.raises(ConfigError, match=message):
            self.read(file, **keys)

    def test_malformed_schema_metadata_is_ignored(self, tmp_path: Path) -> None:
        for name, metadata in (("a", b'{"info": [1]}'), ("b", b"{"), ("c", b'{"info": {"features": {"text": 1}}}')):
            table = pa.table({"jpg": [b"1"], "text": ["words"]}).replace_schema_metadata({b"huggingface": metadata})
            pq.write_table(table, tmp_path / f"{name}.parquet")
        assert [(raw.data, raw.alt_text) for raw in self.read(tmp_path)] == [(b"1", "words")] * 3

    @pytest.mark.parametrize(
        ("size", "num", "most"), [(1 << 22, 40, 100 << 20), pytest.param(1 << 26, 8, 250 << 20, marks=pytest.mark.slow)]
    )
    def test_a_repeated_value_is_not_unpacked_for_all_rows_at_once(
        self, tmp_path: Path, size: int, num: int, most: int
    ) -> None:
        file = self.write(tmp_path / "a.parquet", {"image": [bytes(size)] * num}, dictionary_pagesize_limit=1 << 30)
        before, num_rows = pa.total_allocated_bytes(), 0
        with file.open("rb") as stream:
            for batch in _parquet.read_batches(_parquet.open_table(stream), ["image"], group=0):
                assert pa.total_allocated_bytes() - before < most
                num_rows += len(batch)
        assert num_rows == num

    def test_reads_through_fsspec(self, tmp_path: Path) -> None:
        import fsspec

        make_parquet(tmp_path / "corpus", 8)
        fsspec.filesystem("memory").put(f"{tmp_path}/corpus/", "/parquet/", recursive=True)
        here, there = self.read(tmp_path / "corpus"), read_all(parquet, parquet.Config(path="memory://parquet"))
        assert here == there

    @pytest.mark.slow
    def test_reads_everything_that_datasets_writes(self, tmp_path: Path) -> None:
        import datasets

        rows = make_hf(tmp_path / "saved", 8)
        datasets.load_from_disk(rows.path).to_parquet(str(tmp_path / "a.parquet"))
        raws = self.read(tmp_path / "a.parquet")
        expected = [(name, data, text) for name, data, text in list_samples(8)]
        assert [(raw.source_key, raw.data, raw.alt_text) for raw in raws] == expected


class TestHf:
    @pytest.mark.slow
    def test_large_rows_are_in_memory_one_at_a_time(self, tmp_path: Path) -> None:
        import datasets

        rows = {"image": [bytes([number]) * (8 << 20) for number in range(10)]}
        features = datasets.Features({"image": datasets.Value("binary")})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        config = hf.Config(path=str(tmp_path / "saved"))
        (piece,) = hf.pieces(config)
        tracemalloc.start()
        first = [raw.data[0] for raw in hf.read(piece, config) if raw.data is not None]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert first == list(range(10))
        assert most < 32 << 20

    def test_reads_all_splits_or_the_configured_one(self, tmp_path: Path) -> None:
        import datasets

        for name, text in (("train", "t"), ("test", "e")):
            rows = {"picture": [{"bytes": b"1", "path": None}], "mask": [b"2"], "text": [text]}
            features = {"mask": datasets.Value("binary"), "picture": datasets.Image(), "text": datasets.Value("string")}
            split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
            split.save_to_disk(tmp_path / "saved" / name)
        (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        config = hf.Config(path=str(tmp_path / "saved"))
        raws = read_all(hf, config)
        assert [piece.file for piece in hf.pieces(config)] == ["train", "test"]
        assert [(raw.source_key, raw.data, raw.alt_text) for raw in raws] == [
            ("train:0", b"1", "t"),
            ("test:0", b"1", "e"),
        ]
        assert read_all(hf, replace(config, split="test")) == raws[1:]
        with pytest.raises(ConfigError, match=r"source\.split: there is no split 'dev'; there are train, test"):
            read_all(hf, replace(config, split="dev"))

    @pytest.mark.slow
    def test_reads_a_folder_that_load_dataset_reads(self, tmp_path: Path) -> None:
        write(tmp_path / "corpus", {name: data for name, data, _ in list_samples(5)})
        rows = [{"file_name": name, "caption": text} for name, _, text in list_samples(5)]
        write_metadata(tmp_path / "corpus/metadata.jsonl", rows)
        config = hf.Config(path=str(tmp_path / "corpus"), cache=str(tmp_path / "cache"), revision="v1")
        raws = read_all(hf, config)
        assert [(raw.source_key, raw.data, raw.alt_text) for raw in raws] == list_samples(5)
        assert {raw.metadata for raw in raws} == {'{"revision": "v1"}'}
        with pytest.raises(ConfigError, match=r"source\.path: .* cannot be loaded"):
            read_all(hf, replace(config, split="dev"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"corpus.py": "raise SystemExit"}, "cannot be loaded: .*script"),
            ({"a.jsonl": '{"a": 1}', "b.jsonl": '{"b": [1]}'}, "cannot be loaded: .*generating the dataset: .*"),
        ],
        ids=["a loading script", "mixed schemas"],
    )
    def test_what_the_library_cannot_load_is_one_line(self, tmp_path: Path, files: Any, message: str) -> None:
        write(tmp_path / "corpus", files)
        with pytest.raises(ConfigError, match=message) as caught:
            list(hf.pieces(hf.Config(path=str(tmp_path / "corpus"), cache=str(tmp_path / "cache"))))
        assert "\n" not in str(caught.value)


class TestImg2dataset:
    def test_failed_downloads_are_rows_and_unfinished_shards_are_skipped(self, tmp_path: Path) -> None:
        config = make_img2dataset(tmp_path / "corpus", 7)
        (tmp_path / "corpus/00002_stats.json").unlink()
        rows = {"key": ["x", "0003", "y", "0004"], "status": ["failed_to_download", "success", "success", "success"]}
        rows["error_message"] = ["HTTP Error 404: Not Found", None, None, None]
        pq.write_table(pa.table(rows), tmp_path / "corpus/00001.parquet")
        raws = read_all(img2dataset, config)
        assert [raw.source_key for raw in raws] == ["0000", "0001", "0002", "x", "0003", "y", "0004", "0005"]
        assert {raw.source_key: raw.error for raw in raws if raw.error} == {
            "x": "failed_to_download: HTTP Error 404: Not Found",
            "y": "img2dataset reports success, but the tar has no such sample",
        }
        assert raws[-1].alt_text == list_samples(7)[5][2]

    def test_two_samples_of_one_name_are_two_rows(self, tmp_path: Path) -> None:
        config = make_img2dataset(tmp_path / "corpus", 3)
        with tarfile.open(tmp_path / "corpus/00000.tar", "a") as tar:
            tar.add(tmp_path / "corpus/00000_stats.json", "0000.jpg")
        raws = read_all(img2dataset, config)
        assert [(raw.source_key, raw.data) for raw in raws[3:]] == [("0000", b"{}")]
        assert len(raws) == 4

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1")])
    def test_without_its_parquet_the_tar_is_read_and_the_loss_is_a_row(self, tmp_path: Path, damage: Any) -> None:
        config = make_img2dataset(tmp_path / "corpus", 3)
        damage(tmp_path / "corpus/00000.parquet")
        *raws, last = read_all(img2dataset, config)
        assert [(raw.data, raw.alt_text) for raw in raws] == [(data, text) for _, data, text in list_samples(3)]
        assert (last.error or "").startswith("the failed downloads are unknown: ")

    def test_a_folder_that_img2dataset_did_not_write_is_refused(self, tmp_path: Path) -> None:
        make_webdataset(tmp_path / "corpus", 3)
        with pytest.raises(ConfigError, match=r"has no tar with its _stats\.json beside it; .* kind = \"webdataset\""):
            read_all(img2dataset, img2dataset.Config(path=str(tmp_path / "corpus")))
        make_img2dataset(tmp_path / "corpus", 3)
        with pytest.raises(ConfigError, match=r"source\.alt_text: there is no column 'alt'; there are key, caption, "):
            read_all(img2dataset, img2dataset.Config(path=str(tmp_path / "corpus"), alt_text="alt"))

    @pytest.mark.slow
    def test_reads_everything_of_a_real_download(self, tmp_path: Path) -> None:
        write(tmp_path / "served", {name: data for name, data, _ in list_samples(8)})
        with serve_folder(tmp_path / "served") as address:
            rows = [(f"{address}/{name}", text) for name, _, text in list_samples(8)]
            rows[3:3] = [(f"{address}/gone.jpg", "not found"), ("http://127.0.0.1:9/x.jpg", "no server")]
            run_img2dataset(tmp_path, rows)
        raws = read_all(img2dataset, img2dataset.Config(path=str(tmp_path / "corpus")))
        by_text = {raw.alt_text: raw for raw in raws}
        assert len(raws) == len(by_text) == 10
        for _, data, text in list_samples(8):
            raw, known = by_text[text], json.loads(by_text[text].metadata)
            assert raw.data == data
            assert known["status"] == "success"
            assert known["sha256"] == sha256(data).hexdigest()
            assert raw.file is not None and raw.offset is not None
            assert Path(raw.file).read_bytes()[raw.offset :].startswith(data)
        assert by_text["not found"].error == "failed_to_download: HTTP Error 404: File not found"
        assert "refused" in (by_text["no server"].error or "")
        assert json.loads(by_text["not found"].metadata)["url"].endswith("/gone.jpg")
        assert len({raw.source_key for raw in raws}) == 10


def run_img2dataset(root: Path, rows: list[tuple[str, str]]) -> None:
    """Runs img2dataset in a child process, since it starts others and prints much."""
    with (root / "urls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])
    options = {
        "url_list": root / "urls.csv",
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": root / "corpus",
        "output_format": "webdataset",
        "number_sample_per_shard": 4,
        "processes_count": 1,
        "thread_count": 2,
        "resize_mode": "no",
        "disable_all_reencoding": True,
        "enable_wandb": False,
    }
    command = [
        str(Path(sys.executable).parent / "img2dataset"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"})


CAPTIONS = [([b"", b"zz"], "zz"), (b"caf\xe9", "café"), ({"text": "q"}, "q"), (b"\x00\x01", None)]


@pytest.mark.parametrize(("value", "alt_text"), CAPTIONS)
def test_a_caption_of_any_type_in_a_table_is_read_as_text(value: object, alt_text: str | None) -> None:
    import pyarrow as pa

    from pipeline.sources._columns import choose_columns, read_samples

    table = pa.table({"image": pa.nulls(1), "jpg": [b"\xff\xd8\x00"], "caption": [value]})
    columns = choose_columns(table.schema, image="", source_key="", alt_text="", short=("caption",))
    assert columns.image == "jpg", "a column of nulls is the images' only if there is no other"
    assert [sample.alt_text for sample in read_samples(table, columns, first=0, name="t")] == [alt_text]


@pytest.mark.parametrize("values", ["a cat", ["a cat", "a grey cat"]], ids=["text", "texts"])
def test_columns_of_tables_that_may_be_alt_text_are_named(values: object, capsys: pytest.CaptureFixture[str]) -> None:
    schema = pa.table({"image": [b"\xff\xd8\xff"], "captions": [values], "rating": [3]}).schema
    columns = _columns.choose_columns(schema, image="", source_key="", alt_text="")
    _columns.report_alt_text(schema, columns)
    assert capsys.readouterr().err.strip().endswith("set source.alt_text to one of captions")
