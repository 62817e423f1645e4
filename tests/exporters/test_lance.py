"""Lance datasets: Lance's own readers find every row and image, and what is made again has the same data files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline.errors import MachineError, UserError
from pipeline.records import Exported, ExportedText, NamedScore, column_names
from pipeline.storage import tables
from stages.exporters import ExportSample, FormFile
from stages.exporters import lance as form
from tests.support.runs import begin, corpus, files, recap, sections, write

PHOTOS = ["jpg", "png", "cut", "webp"] * 3
NUM = 9  # of them that can be decoded


def configure(photos: Path, **export: Any) -> dict[str, dict[str, Any]]:
    parts = sections(photos, filter={"rules": {}}, export={"formats": ["lance"], **export})
    return {**parts, "source": {**parts["source"], "shard_size": 5}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lance")
    run = begin(folder / "run", configure(corpus(folder / "photos", PHOTOS)))
    recap("run", "all", "--run", run)
    return run


def copy(run: Path, folder: Path) -> Path:
    shutil.copytree(run.parent, folder)
    return folder / "run"


def open_dataset(run: Path, split: str = "") -> Any:
    import lance

    return lance.dataset(str(run / "export/lance" / split))


def read_rows(run: Path) -> list[Exported]:
    return [
        row for path in sorted((run / "export/index").glob("*.parquet")) for row in tables.read_rows(path, Exported)
    ]


def list_data(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(run / "export/lance").items() if not name.endswith(".manifest")}


@pytest.mark.slow
def test_readers_find_every_row_and_the_images_of_the_corpus(run: Path) -> None:
    from lance.fragment import DataFile
    from lance.torch.data import SafeLanceDataset
    from torch.utils.data import DataLoader

    rows, dataset = read_rows(run), open_dataset(run)
    assert dataset.count_rows() == len(rows) == NUM
    assert dataset.count_rows("source_key LIKE '%.png'") == 3
    images = [(run.parent / "photos" / row.source_key).read_bytes() for row in rows]
    found = dataset.to_table().to_pylist()
    assert [one.pop("image") for one in found] == images
    assert [(one["key"], one["caption"], one["width"]) for one in found] == [
        (row.key, row.caption, row.width) for row in rows
    ]
    assert dataset.take([7, 2], columns=["image", "key"]).to_pylist() == [
        {"image": images[at], "key": rows[at].key} for at in (7, 2)
    ]
    batches = DataLoader(SafeLanceDataset(str(run / "export/lance")), batch_size=4, collate_fn=list)
    assert [row["image"] for batch in batches for row in batch] == images
    for fragment in dataset.get_fragments():
        (file,) = fragment.metadata.files
        assert file == DataFile.create(dataset, file.path)
    assert sorted(list_data(run)) == ["data/00000.lance", "data/00001.lance", "data/00002.lance"]


@pytest.mark.slow
def test_an_export_that_is_made_again_has_the_same_data_files_and_the_current_rows_alone(
    run: Path, tmp_path: Path
) -> None:
    import lance

    again = copy(run, tmp_path / "again")
    dataset = open_dataset(again)
    rows = dataset.to_table()
    lance.write_dataset(rows.slice(0, 2), dataset.uri, mode="append")
    dataset = open_dataset(again)
    dataset.create_scalar_index("caption", "BTREE")
    dataset.delete("width > 0")
    assert dataset.count_rows() == 0
    (again / "export/index/00001.parquet").unlink()
    recap("run", "export", "--run", again)
    assert list_data(again) == list_data(run)
    assert (open_dataset(again).version, open_dataset(again).to_table()) == (1, rows)
    assert "0 files damaged" in recap("verify", "--run", again).stderr

    shutil.rmtree(again / "export")
    recap("run", "export", "--run", again)
    assert list_data(again) == list_data(run)
    assert open_dataset(again).to_table() == rows


@pytest.mark.slow
def test_an_export_that_was_killed_after_its_last_shard_is_finished(run: Path, tmp_path: Path) -> None:
    again = copy(run, tmp_path / "again")
    manifest, sums = again / "export/lance" / form.MANIFEST, again / "export/index/SHA256SUMS"
    scratch = again / "export/lance" / f".dataset.00000000-{2**22 + 1}-{'0' * 12}.tmp"
    (scratch / "_versions").mkdir(parents=True)
    os.utime(scratch, (0, 0))
    manifest.write_bytes(b"of an earlier export")
    os.utime(sums, ns=(0, 0))
    recap("run", "export", "--run", again)
    assert open_dataset(again).to_table() == open_dataset(run).to_table()
    assert not scratch.exists()
    manifest.unlink()
    sums.unlink()
    recap("run", "export", "--run", again)
    assert open_dataset(again).count_rows() == NUM
    before = manifest.read_bytes()
    recap("run", "export", "--run", again)
    assert manifest.read_bytes() == before


@pytest.mark.slow
def test_splits_are_datasets_and_files_of_a_wanted_size_are_their_data_files(run: Path, tmp_path: Path) -> None:
    again = copy(run, tmp_path / "again")
    shares = {"train": 0.6, "val": 0.4}
    write(again, configure(again.parent / "photos", split=shares, shard_bytes=2000, shuffle=1))
    recap("run", "export", "--stale", "redo", "--run", again)
    keys = {split: open_dataset(again, split).to_table(columns=["key"])["key"].to_pylist() for split in shares}
    assert sorted(keys["train"] + keys["val"]) == [row.key for row in read_rows(run)]
    assert keys["train"] != sorted(keys["train"])
    assert len(open_dataset(again, "train").get_fragments()) > 1
    assert not (again / "export/lance" / form.MANIFEST).exists()
    assert "0 files damaged" in recap("verify", "--run", again).stderr

    write(again, configure(again.parent / "photos"))
    recap("run", "export", "--stale", "redo", "--run", again)
    assert list_data(again) == list_data(run)
    assert [str(path.relative_to(again / "export/lance")) for path in (again / "export/lance").rglob("*.manifest")] == [
        form.MANIFEST
    ]


def make_sample(number: int, columns: tuple[str, ...] = column_names(Exported)) -> ExportSample:
    random = Random(number)
    text = " ".join(random.choice(["red", "square", "über", "\n"]) for _ in range(random.randrange(90)))
    kept = ExportedText(text=text, caption_pass="dense", candidate=0, score=0.5, num_tokens=1, cut=0)
    row = Exported(
        key=f"{number:012d}",
        source_key=f"{number}.jpg",
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        caption=text,
        alt_text=text[: number % 3],
        caption_pass="dense",
        candidate=0,
        model="echo",
        revision="1",
        scores=tuple(NamedScore(name=name, value=random.random()) for name in ("judge", "form")[: number % 3]),
        texts=(kept,) * (number % 4),
        format="jpeg",
        width=random.randrange(1, 5000),
        height=30,
        num_bytes=random.randrange(3000),
        metadata="{}",
    )
    return ExportSample(row=row, data=random.randbytes(row.num_bytes), columns=columns)


def write_samples(run: Path, shard: int, samples: list[ExportSample]) -> list[FormFile]:
    writer = form.open(run, shard, run / ".work")
    for sample in samples:
        writer.add(sample, "jpg")
    return [FormFile(name=name.removeprefix("export/lance/"), num_bytes=num) for name, num in writer.commit().items()]


def test_equal_samples_give_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "BATCH_BYTES", 1 << 18)
    samples = [make_sample(number) for number in range(1200)]
    written = []
    for name in ("a", "b", "c"):
        write_samples(tmp_path / name, 7, samples)
        written.append(files(tmp_path / name, without=()))
    assert written[0].keys() == {"export/lance/data/00007.lance"}
    assert written[0] == written[1] == written[2]
    found = form.read_images(tmp_path / "a/export/lance/data/00007.lance")
    assert dict(found) == {sample.row.key: sample.data for sample in samples}


def test_values_are_those_of_the_samples_and_columns_that_some_files_lack_are_null(tmp_path: Path) -> None:
    first = [make_sample(number) for number in range(5)]
    second = [make_sample(number, ("key", "caption", "scores")) for number in range(5, 8)]
    written = write_samples(tmp_path, 0, first) + write_samples(tmp_path, 1, []) + write_samples(tmp_path, 2, second)
    form.write_index(tmp_path / "export/lance", written)
    found = open_dataset(tmp_path).to_table().to_pylist()
    missing = dict.fromkeys(column_names(Exported))
    assert found == [{"image": sample.data, **missing, **sample.values} for sample in first + second]
    form.write_index(tmp_path / "export/lance", [])
    assert not (tmp_path / "export/lance" / form.MANIFEST).exists()


def test_nothing_is_in_place_before_it_is_complete(tmp_path: Path) -> None:
    for is_committed in (False, True):
        writer = form.open(tmp_path, 0, tmp_path / ".work")
        writer.add(make_sample(1), "jpg")
        assert list_data(tmp_path) == {}
        writer.commit() if is_committed else writer.abandon()
        assert list((tmp_path / ".work").iterdir()) == []
    assert list(list_data(tmp_path)) == ["data/00000.lance"]
    form.open(tmp_path, 0, tmp_path / ".work").commit()
    assert list_data(tmp_path) == {}


@pytest.mark.parametrize("num_bytes", [0, 9, 5000, -1])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, num_bytes: int) -> None:
    write_samples(tmp_path, 0, [make_sample(number) for number in range(20)])
    path = tmp_path / "export/lance/data/00000.lance"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises((OSError, ValueError)):
        list(form.read_images(path))


def test_without_the_library_the_advice_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[lance\]'"):
        form.open(tmp_path, 0, tmp_path)
    with pytest.raises(MachineError, match="needs pylance"):
        list(form.read_images(tmp_path))
