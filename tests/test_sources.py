"""The promises that every source keeps, and what is particular to each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline import plan
from pipeline.errors import ConfigError
from pipeline.records import Raw
from pipeline.sources import folder, webdataset


def photo(package: str, path: str) -> bytes:
    """The bytes of a picture that ships with a package, found without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_bytes()


PHOTOS = {name: photo("sklearn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")} | {
    name: photo("skimage", f"data/{name}")
    for name in ("rocket.jpg", "cell.png", "chelsea.png", "text.png", "multipage.tif", "no_time_for_that_tiny.gif")
}
Maker = Callable[[Path, int], Any]


def samples(num: int) -> list[tuple[str, bytes, str]]:
    """Numbered photographs with something to say about each: name, bytes, alt text."""
    names = sorted(PHOTOS)
    chosen = [names[index % len(names)] for index in range(num)]
    return [
        (f"{index:04d}.{name.split('.')[1]}", PHOTOS[name], f"{index}: {name}") for index, name in enumerate(chosen)
    ]


def make_folder(root: Path, num: int) -> folder.Config:
    root.mkdir(exist_ok=True)
    for name, data, alt_text in samples(num):
        (root / name).write_bytes(data)
        (root / f"{name[:4]}.txt").write_text(alt_text)
    return folder.Config(path=str(root))


def make_webdataset(root: Path, num: int) -> webdataset.Config:
    import webdataset as wds

    root.mkdir(exist_ok=True)
    for shard in range(-(-num // 3)):
        with wds.TarWriter(str(root / f"{shard:05d}.tar"), mtime=0) as writer:
            for name, data, alt_text in samples(num)[3 * shard : 3 * shard + 3]:
                writer.write({"__key__": name[:4], name[5:]: data, "txt": alt_text, "json": {"number": int(name[:4])}})
    return webdataset.Config(path=str(root))


SOURCES: dict[ModuleType, Maker] = {folder: make_folder, webdataset: make_webdataset}


@pytest.fixture(params=SOURCES, ids=lambda module: module.__name__.rpartition(".")[2])
def source(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def read_all(source: ModuleType, config: Any) -> list[Raw]:
    return [raw for piece in source.pieces(config) for raw in source.read(piece, config)]


class TestEverySource:
    def test_gives_every_image_once_in_order_with_its_bytes_and_words(self, source: ModuleType, tmp_path: Path) -> None:
        raws = read_all(source, SOURCES[source](tmp_path / "corpus", 8))
        assert [(raw.data, raw.alt_text, raw.error) for raw in raws] == [(b, text, None) for _, b, text in samples(8)]
        assert len({raw.source_key for raw in raws}) == 8

    def test_knows_the_length_of_a_piece_or_says_that_it_does_not(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 8)
        for piece in source.pieces(config):
            assert piece.num_samples in (None, len(list(source.read(piece, config))))

    def test_reads_the_same_twice(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 8)
        assert list(source.pieces(config)) == list(source.pieces(config))
        assert read_all(source, config) == read_all(source, config)

    def test_a_part_of_a_piece_is_that_slice_of_it(self, source: ModuleType, tmp_path: Path) -> None:
        config = SOURCES[source](tmp_path / "corpus", 6)
        for piece in source.pieces(config):
            whole = list(source.read(piece, config))
            for start in range(len(whole) + 1):
                for stop in range(start, len(whole) + 1):
                    part = replace(piece, start=piece.start + start, stop=piece.start + stop)
                    assert list(source.read(part, config)) == whole[start:stop]

    def test_growth_moves_nothing(self, source: ModuleType, tmp_path: Path) -> None:
        """Nine samples, then fourteen: what was planned stays, and reads as it did; the rest comes after it."""
        config, file = SOURCES[source](tmp_path / "corpus", 9), tmp_path / "plan.parquet"
        plan.freeze(file, source.pieces(config), shard_size=3)
        before = planned(source, file, config)
        assert len(before) == 9
        plan.freeze(file, source.pieces(SOURCES[source](tmp_path / "corpus", 14)), shard_size=3)
        after = planned(source, file, config)
        assert after[:9] == before
        assert sorted(raw.alt_text or "" for raw in after) == sorted(text for _, _, text in samples(14))

    def test_bytes_that_are_referenced_lie_there(self, source: ModuleType, tmp_path: Path) -> None:
        for raw in read_all(source, SOURCES[source](tmp_path / "corpus", 8)):
            assert (raw.file is None) == (raw.offset is None)
            if raw.file is not None and raw.offset is not None and raw.data is not None:
                assert Path(raw.file).read_bytes()[raw.offset :].startswith(raw.data)

    def test_metadata_is_an_object_in_json(self, source: ModuleType, tmp_path: Path) -> None:
        for raw in read_all(source, SOURCES[source](tmp_path / "corpus", 8)):
            assert isinstance(json.loads(raw.metadata), dict)

    def test_a_path_that_is_not_there_is_named(self, source: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"source\.path: .*nowhere.* does not exist; write the path"):
            list(source.pieces(source.Config(path=str(tmp_path / "nowhere"))))


def planned(source: ModuleType, file: Path, config: Any) -> list[Raw]:
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

    def test_every_file_is_an_input_but_side_cars_metadata_and_hidden_ones(self, tmp_path: Path) -> None:
        inputs = ["a.jpg", "alone.txt", "b/c.PNG", "b/c.d/e.webp", "misnamed.dat", "no_extension", "notes.json"]
        others = ["a.txt", "a.json", "b/c.txt", "b/c.PNG.json", ".x.jpg", ".git/x.jpg", "b/metadata.csv", "b/.x/y.jpg"]
        write(tmp_path, dict.fromkeys(inputs + others, "file_name") | {"empty.jpg": b""})
        raws = self.read(tmp_path)
        assert sorted(raws) == sorted([*inputs, "empty.jpg"])
        assert raws["empty.jpg"].data == b""
        assert all(raw.error is None for raw in raws.values())

    def test_a_side_car_says_the_alt_text_and_its_json_the_rest(self, tmp_path: Path) -> None:
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

    def test_the_nearest_metadata_file_that_knows_an_image_counts(self, tmp_path: Path) -> None:
        write(tmp_path, {"a/x.jpg": "", "a/y.jpg": ""})
        write_metadata(tmp_path / "metadata.csv", [{"file_name": f"a/{name}.jpg", "text": "far"} for name in "xy"])
        write_metadata(tmp_path / "a/metadata.csv", [{"file_name": "x.jpg", "text": "near"}])
        raws = self.read(tmp_path)
        assert (raws["a/x.jpg"].alt_text, raws["a/y.jpg"].alt_text) == ("near", "far")

    def test_a_changed_metadata_file_is_read_again(self, tmp_path: Path) -> None:
        for text in ("before", "and after"):
            write(tmp_path, {"a.jpg": "", "metadata.csv": f"file_name,text\na.jpg,{text}\n"})
            assert self.read(tmp_path)["a.jpg"].alt_text == text

    def test_names_in_any_script_and_in_none(self, tmp_path: Path) -> None:
        names = ["קיץ/חתול 🐈.jpg", "дом.jpg", "a\nb.jpg", r"real\xff.jpg", r"back\slash.jpg"]
        write(tmp_path, {name: name for name in names})
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/raw\xff.jpg")).write_bytes(b"bytes")
        raws = self.read(tmp_path)
        assert {raw.data for raw in raws.values()} == {name.encode() for name in names} | {b"bytes"}
        assert raws[r"raw\xff.jpg"].data == b"bytes"
        assert raws[r"real\x5cxff.jpg"].data == rb"real\xff.jpg"
        assert all(raw.source_key.encode() for raw in raws.values())

    def test_links_lead_nowhere_outside(self, tmp_path: Path) -> None:
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
        assert raws["a.jpg"].alt_text is None
        assert raws["out.jpg"].error == raws["far.jpg"].error == "it leads out of the folder"
        assert raws["round"].error == "it is a folder"
        assert raws["pipe.jpg"].error == "it is no plain file"

    def test_a_file_that_has_gone_is_a_row_but_a_folder_that_has_gone_is_not(self, tmp_path: Path) -> None:
        config = make_folder(tmp_path / "corpus", 1)
        (piece,) = folder.pieces(config)
        (tmp_path / "corpus" / piece.file).unlink()
        (raw,) = folder.read(piece, config)
        assert raw.data is None
        assert raw.error == "it cannot be read: No such file or directory"
        (tmp_path / "corpus").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            list(folder.read(piece, config))

    def test_the_user_is_told_of_metadata_without_names_and_of_alt_text_that_no_file_has(self, tmp_path: Path) -> None:
        write(tmp_path, {"metadata.csv": "image,text\na.jpg,words\n", "a.jpg": ""})
        with pytest.raises(ConfigError, match=r"metadata\.csv: has no column 'file_name', only image, text"):
            self.read(tmp_path)
        write(tmp_path, {"metadata.csv": "file_name,text\na.jpg,words\n"})
        with pytest.raises(ConfigError, match=r"source\.alt_text: .* column 'txet'; they have file_name, text"):
            self.read(tmp_path, alt_text="txet")
        assert self.read(tmp_path, alt_text="text")["a.jpg"].alt_text == "words"

    @pytest.mark.slow
    def test_what_datasets_reads_from_an_imagefolder_is_what_we_read(self, tmp_path: Path) -> None:
        import datasets

        write(tmp_path / "corpus", {name: data for name, data, _ in samples(5)})
        rows = [{"file_name": name, "caption": text} for name, _, text in samples(5)]
        write_metadata(tmp_path / "corpus/metadata.jsonl", rows)
        theirs = datasets.load_dataset("imagefolder", data_dir=tmp_path / "corpus", cache_dir=str(tmp_path / "cache"))
        theirs = theirs["train"].cast_column("image", datasets.Image(decode=False))
        expected = [(Path(row["image"]["path"]).name, row["caption"]) for row in theirs]
        assert [(raw.source_key, raw.alt_text) for raw in self.read(tmp_path / "corpus").values()] == expected
