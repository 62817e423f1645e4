"""Images of a folder stay where they are: every stage reads them there, and notices when they change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import pytest

from tests.support.runs import begin, corpus, files, make, picture, recap, sections, write

pytestmark = pytest.mark.slow

KINDS = ["jpg", "cut", "png", "webp"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    photos = corpus(tmp_path / "photos", KINDS)
    corpus(photos / "photos", KINDS[:1])  # as the corpus is called, so that only whole names tell the two apart
    (photos / os.fsdecode(b"z\xff.jpg")).write_bytes(picture(9))  # a name that no table can hold
    return begin(tmp_path / "run", sections(photos))


def test_only_what_a_table_cannot_name_is_copied(run: Path) -> None:
    assert make(run).exit_code == 0
    rows = duckdb.sql(f"SELECT source_key, file, num_bytes FROM '{run}/image/*.parquet' WHERE status = 'ok'").fetchall()
    assert {key: file for key, file, _ in rows} == {
        **{key: f"{run.parent}/photos/{key}" for key in ("00000.jpg", "00002.png", "00003.webp", "photos/00000.jpg")},
        "z\\xff.jpg": "shards/00000.tar",
    }
    assert make(run).done == 0
    assert recap("verify", "--run", run).stdout == ""


def test_a_packed_run_exports_the_same_bytes(run: Path, tmp_path: Path) -> None:
    packed = begin(tmp_path / "packed" / "run", sections(tmp_path / "photos", source={"pack": True}))
    assert [make(one).exit_code for one in (run, packed)] == [0, 0]
    both = [files(one / "export", without=("index",)) for one in (run, packed)]
    assert both[0] == both[1]
    shutil.rmtree(tmp_path / "photos")
    shutil.rmtree(packed / "export")
    assert make(packed).exit_code == 0


def test_a_moved_folder_is_followed_by_its_path_alone(run: Path, tmp_path: Path) -> None:
    make(run, "ingest")
    (tmp_path / "photos").rename(tmp_path / "moved")
    write(run, sections(tmp_path / "moved"))
    outcome = make(run)
    assert (outcome.exit_code, outcome.failures) == (0, {})


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_changed_file_is_noticed_and_can_be_read_as_it_is_now(run: Path, tmp_path: Path, change: str) -> None:
    make(run, "ingest")
    file = tmp_path / "photos" / "00000.jpg"
    file.unlink() if change == "remove" else file.write_bytes(picture(77))
    outcome = make(run)
    assert outcome.exit_code == 1
    assert any(str(file) in why for why in outcome.failures.values())
    done = recap("verify", "--run", run, check=False)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{file} ") and f"rm -f {run}/image/00000.parquet && recap run ingest --shard 0" in line
    (run / "image" / "00000.parquet").unlink()
    assert (make(run).exit_code, recap("verify", "--run", run).stdout) == (0, "")


def test_the_cost_on_disk_is_printed_before_anything_is_copied(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", KINDS)
    done = recap("init", tmp_path / "run", "--source", photos)
    assert "of images are read where they are; none is copied" in done.stderr
    file = tmp_path / "run" / "run.toml"
    file.write_text(file.read_text().replace("# pack = false", "pack = true"))
    size = (corpus(photos, ["jpg"], first=9) / "00009.jpg").stat().st_size
    assert f"ingest copies {size} bytes of images into" in recap("plan", "--run", tmp_path / "run").stderr
