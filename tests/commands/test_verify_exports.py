"""`recap verify` names each exported file that is lost, empty, replaced or unknown, and reads all others."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.execution import verification
from pipeline.records import Record
from pipeline.storage import tables
from pipeline.storage.integrity import check_table
from tests.commands.test_verify import mend, verify
from tests.support.runs import begin, corpus, make, recap, sections, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    formats = ["sidecar", "llava", "messages", "webdataset", "parquet"]
    parts = sections(
        corpus(folder / "photos", ["jpg", "png"] * 2),
        source={"shard_size": 2},
        filter={"rules": {}},
        export={"formats": formats},
    )
    run = begin(folder / "run", parts)
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    copy = finished.parent / tmp_path.name  # beside the corpus
    shutil.copytree(finished, copy)
    yield copy
    shutil.rmtree(copy)


def name_damaged(run: Path) -> list[str]:
    return [line.partition(";")[0] for line in verify(run)]


@pytest.mark.slow
def test_every_lost_or_empty_loose_file_is_named_and_mended(run: Path) -> None:
    export = run / "export"
    (export / "sidecar/00000/000000000000.txt").unlink()
    (export / "sidecar/00000/000000000001.jpg").write_bytes(b"")
    (export / "sidecar/00001/000001000000.txt").write_text("another caption\n")
    (export / "llava/images/00000/000000000000.jpg").unlink()
    (export / "llava/images/00000/000000000000.jpg").mkdir()
    shutil.rmtree(export / "messages/images/00001")
    (export / "messages/images/00001").write_bytes(b"")
    (export / "webdataset/00001.tar").write_bytes(b"")
    lines = verify(run)
    assert [line.partition(";")[0] for line in lines] == [
        "export/llava/images/00000/000000000000.jpg is a directory",
        "export/sidecar/00000/000000000000.txt is missing",
        "export/sidecar/00000/000000000001.jpg is empty",
        "export/webdataset/00001.tar has 0 bytes",
        "export/messages/images/00001/000001000000.jpg is missing",
        "export/messages/images/00001/000001000001.jpg is missing",
        "export/sidecar/00001/000001000000.txt does not have the caption of 000001000000",
    ]
    for line in lines:
        mend(line)
    assert verify(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image/00000.parquet", "verdict/00001.parquet", "stats/verdict/00001.parquet"])
def test_a_directory_in_the_place_of_a_table_is_named_with_all_other_damage(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()
    (run / "export/webdataset/00001.tar").unlink()
    lines = verify(run)
    assert [line.partition(";")[0] for line in lines] == [
        f"{name} cannot be opened: Is a directory",
        "export/webdataset/00001.tar is missing",
    ]
    for line in lines:
        mend(line)
    assert verify(run) == []


@pytest.mark.slow
def test_a_file_in_the_place_of_a_directory_is_named_for_every_shard(run: Path) -> None:
    shutil.rmtree(run / "verdict")
    (run / "verdict").write_text("")
    (run / "export/README.md").unlink()
    (run / "export/README.md").mkdir()
    lines = verify(run)
    assert [line.partition(";")[0] for line in lines] == [
        "verdict/00000.parquet cannot be opened: Not a directory",
        "export/README.md is a directory",
        "verdict/00001.parquet cannot be opened: Not a directory",
    ]
    mend(lines[0])
    assert make(run).exit_code == 0  # the other shard
    (line,) = verify(run)
    mend(line)
    assert verify(run) == []


@pytest.mark.slow
def test_a_file_that_cannot_be_read_ends_no_other_check(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, record: type[Record], *, shard: int | None = None) -> tables.TableFooter:
        if path == run / "verdict/00000.parquet":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return check_table(path, record, shard=shard)

    monkeypatch.setattr(verification, "check_table", fail)
    (run / "export/webdataset/00001.tar").unlink()
    done = recap("verify", "--run", run, check=False)
    assert done.returncode == 1
    assert [line.partition(";")[0] for line in done.stdout.splitlines()] == ["export/webdataset/00001.tar is missing"]
    assert "shard 00000 was not read to its end: [Errno 5] Input/output error" in done.stderr
    assert "not all files could be read" in done.stderr


@pytest.mark.slow
def test_files_that_belong_to_no_shard_are_named_and_removed(run: Path) -> None:
    strays = {
        "caption/dense/.copy.parquet": "caption/dense/00000.parquet",
        "caption/dense/000000.parquet": "caption/dense/00000.parquet",
        "caption/dense/copy.parquet": "caption/dense/00000.parquet",
        "stats/caption/dense/00003.parquet": "stats/caption/dense/00000.parquet",
        "stats/copy.parquet": "stats/verdict/00000.parquet",
        "export/parquet/00007.parquet": "export/parquet/00000.parquet",
        "export/sidecar/00000 (copy)": "export/sidecar/00000",
        "export/sidecar/00000/copy.txt": "export/sidecar/00000/000000000000.txt",
        "export/sidecar/00000.old": "export/sidecar/00000",
        "export/sidecar/00002": "export/sidecar/00001",
        "export/messages/images/00000/1.jpg": "export/messages/images/00000/000000000000.jpg",
        "export/messages/images/00003": "export/messages/images/00000",
        "export/webdataset/00000 (copy).tar": "export/webdataset/00000.tar",
        "export/webdataset/00003.tar": "export/webdataset/00000.tar",
        "export/webdataset/extra": "export/messages/images/00001",
    }
    for name, source in strays.items():
        copy = shutil.copytree if (run / source).is_dir() else shutil.copy
        copy(run / source, run / name)
    (run / "export/webdataset/.DS_Store").write_text("")
    lines = verify(run)
    assert sorted(line.partition(";")[0] for line in lines) == sorted(
        f"{name} belongs to no shard of plan.parquet" for name in strays
    )
    for line in lines:
        mend(line)
    assert verify(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", [0, 1])
def test_files_beside_a_missing_table_belong_to_its_shard(run: Path, shard: int) -> None:
    (run / f"export/index/{shard:05d}.parquet").unlink()
    assert verify(run) == []
    shutil.copy(run / "export/webdataset/00000.tar", run / "export/webdataset/00009.tar")
    assert name_damaged(run) == ["export/webdataset/00009.tar belongs to no shard of plan.parquet"]
    shutil.rmtree(run / "export/index")
    assert name_damaged(run) == ["export/webdataset/00009.tar belongs to no shard of plan.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("is_stale", [False, True])
def test_tables_of_two_shards_that_were_exchanged_are_damaged_in_any_state(run: Path, is_stale: bool) -> None:
    if is_stale:
        text = (run / "run.toml").read_text()
        (run / "run.toml").write_text(text.replace("[caption.dense]", "[caption.dense]\nnum_candidates = 2"))
    for folder in ("caption/dense", "stats/caption/dense"):
        first, second = run / folder / "00000.parquet", run / folder / "00001.parquet"
        first.rename(run / "kept")
        second.rename(first)
        (run / "kept").rename(second)
    lines = [line for line in verify(run) if "caption/dense/" in line.split(" ")[0]]
    assert [line.partition(";")[0] for line in lines] == [
        "caption/dense/00000.parquet has rows of another shard: 000001000000 the first",
        "stats/caption/dense/00000.parquet has rows of other tables than caption/dense/00000.parquet: "
        "[('caption', 'dense', '', 1)]",
        "caption/dense/00001.parquet has rows of another shard: 000000000000 the first",
        "stats/caption/dense/00001.parquet has rows of other tables than caption/dense/00001.parquet: "
        "[('caption', 'dense', '', 0)]",
    ]


@pytest.mark.slow
def test_statistics_of_another_pass_are_damaged(run: Path) -> None:
    shutil.copy(run / "stats/verdict/00000.parquet", run / "stats/image/00000.parquet")
    (line,) = verify(run)
    assert line.startswith("stats/image/00000.parquet has rows of other tables than image/00000.parquet")
    mend(line)
    assert verify(run) == []


@pytest.mark.slow
def test_names_that_the_list_of_digests_has_twice_or_that_are_gone_are_named(run: Path) -> None:
    sums = run / "export/index/SHA256SUMS"
    text = sums.read_text()
    (run / "export/croissant.json").unlink()
    (line,) = verify(run)
    assert line.startswith("export/croissant.json is missing: export/index/SHA256SUMS lists it")
    mend(line)
    assert verify(run) == []
    sums.write_text(text + text.splitlines()[0] + "\n")
    (line,) = verify(run)
    assert line.startswith("export/index/SHA256SUMS lists export/README.md more than once")
    mend(line)
    assert verify(run) == []


@pytest.mark.slow
def test_tables_of_an_earlier_configuration_are_stale_but_not_damaged(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png"] * 2)
    parts = sections(photos, source={"shard_size": 2}, curate={}, export={"formats": ["webdataset"], "shuffle": 3})
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    del parts["curate"], parts["export"]["shuffle"]
    write(run, parts)
    assert verify(run) == []
    image = run / "image" / "00001.parquet"
    image.write_bytes(image.read_bytes()[:-1])
    assert [line.split(" ")[0] for line in verify(run)] == ["image/00001.parquet"]
