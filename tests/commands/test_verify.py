"""`recap verify` names every damaged file of a run and the command that mends it; a sound run gives exit code 0."""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import BrokenTableError
from pipeline.records import Caption, arrow_schema
from pipeline.storage import tables
from pipeline.storage.integrity import check_plan
from tests.support.flips import finish_run, flip_bit, flip_bits, list_protected_files
from tests.support.runs import ROOT, recap


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish_run(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    copy = finished.parent / tmp_path.name  # beside the corpus
    shutil.copytree(finished, copy)
    yield copy
    shutil.rmtree(copy)


def verify(run: Path, *arguments: str) -> list[str]:
    done = recap("verify", "--run", run, *arguments, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == (1 if lines else 0)
    return lines


def mend(line: str) -> None:
    """Does what a line of the command advises."""
    for command in line.partition("; to mend it: ")[2].split(" && "):
        program, *words = shlex.split(command)
        if program == "rm":
            subprocess.run([program, *words], check=True)
        else:
            assert program == "recap"
            recap(*words)


@pytest.mark.slow
def test_a_sound_run_has_no_damage_and_nothing_is_written(run: Path) -> None:
    before = {file: file.read_bytes() for file in list_protected_files(run)}
    done = recap("verify", "--run", run)
    assert (done.stdout, done.returncode) == ("", 0)
    assert "tables of 2 shards read, 0 files damaged" in done.stderr
    assert {file: file.read_bytes() for file in list_protected_files(run)} == before


@pytest.mark.slow
def test_single_flipped_bits_are_named_in_every_kind_of_file(run: Path) -> None:
    flips = flip_bits(run, num_flips=90, seed=15)
    assert (flips.named, flips.wrong_answers) == (flips.flips, 0), flips
    kinds = {f"{file.parent.relative_to(run)}/*{file.suffix}" for file in list_protected_files(run)}
    assert flips.by_kind.keys() == kinds
    assert verify(run) == []


def test_flipped_bits_of_the_plan_are_named_before_anything_is_compared_with_it(run: Path) -> None:
    noise, data = random.Random(16), (run / "plan.parquet").read_bytes()
    for _ in range(10):
        flip_bit(run / "plan.parquet", noise)
        (line,) = verify(run)
        assert line.startswith("plan.parquet ") and "restore it from a copy" in line
        (run / "plan.parquet").write_bytes(data)


@pytest.mark.slow
def test_every_byte_of_a_plan_is_protected(run: Path) -> None:
    path, data = run / "plan.parquet", (run / "plan.parquet").read_bytes()
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(BrokenTableError):
            check_plan(path)
    path.write_bytes(data)
    check_plan(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "image/00001.parquet",
        "shards/00000.tar",
        "verdict/00000.parquet",
        "export/webdataset/00001.tar",
        "export/parquet/00000.parquet",
        "export/README.md",
        "export/index/SHA256SUMS",
        "stats/verdict/00000.parquet",
    ],
)
def test_the_printed_command_mends_the_file(run: Path, name: str) -> None:
    before = (run / name).read_bytes()
    flip_bit(run / name, random.Random(17))
    lines = verify(run)
    # Of a file whose digest stands only in the list, nothing tells which of the two was damaged.
    suspects = [name, "export/index/SHA256SUMS"] if name == "export/README.md" else [name]
    assert [line.split(" ")[0] for line in lines] == suspects
    mend(lines[0])
    assert verify(run) == []
    if not name.startswith(("stats", "export/README", "export/index")):  # the card's title is the directory's name
        assert (run / name).read_bytes() == before


@pytest.mark.slow
def test_rows_that_do_not_fit_their_inputs_are_named(run: Path) -> None:
    path = run / "caption" / "dense" / "00000.parquet"
    footer, rows = tables.read_footer(path), list(tables.read_rows(path, Caption))
    assert footer is not None
    tables.write_rows(path, Caption, rows[1:], footer.provenance)
    shutil.rmtree(run / "export")
    lines = [line for line in verify(run) if line.startswith("caption/")]
    assert len(lines) == 1 and "inputs" in lines[0] and "recap run caption:dense --shard 0" in lines[0]


@pytest.mark.slow
def test_rows_that_do_not_have_the_digest_of_their_footer_are_named_and_made_again(run: Path) -> None:
    path = run / "caption" / "dense" / "00001.parquet"
    before, text, rows = path.read_bytes(), tables.read_footer_text(path), list(tables.read_rows(path, Caption))
    with path.open("wb") as file, tables.open_parquet(file, arrow_schema(Caption)) as writer:
        writer.write_batch(tables.to_arrow(Caption, [replace(rows[0], text="Another."), *rows[1:]]))
        writer.add_key_value_metadata({tables.FOOTER_KEY: text})
    (line,) = verify(run)
    assert line.startswith("caption/dense/00001.parquet has other rows than it was written with: their SHA-256")
    mend(line)
    assert (verify(run), path.read_bytes()) == ([], before)


def test_tables_beyond_the_plan_and_missing_payload_are_named_but_not_missing_tables(run: Path) -> None:
    shutil.copy(run / "image" / "00000.parquet", run / "image" / "00007.parquet")
    (run / "export" / "webdataset" / "00001.tar").unlink()
    (run / "verdict" / "00000.parquet").unlink()
    assert [line.split(";")[0] for line in verify(run)] == [
        "image/00007.parquet belongs to no shard of plan.parquet",
        "export/webdataset/00001.tar is missing",
    ]


@pytest.mark.slow
def test_shards_are_verified_by_themselves(run: Path) -> None:
    flip_bit(run / "verdict" / "00001.parquet", random.Random(18))
    assert verify(run, "--shard", "0/2") == []
    assert [line.split(" ")[0] for line in verify(run, "--shard", "1/2")] == ["verdict/00001.parquet"]
    assert recap("verify", "--run", run, "--shard", "9", check=False).returncode == 2


@pytest.mark.slow
def test_exported_images_are_compared_with_their_rows_where_no_digest_is_recorded(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "data" / "earlier_runs" / "photos.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "photos"
    assert verify(run) == []
    assert tables.read_footer(run / "export" / "index" / "00000.parquet").payload_sha256 == {}  # type: ignore[union-attr]
    for name in ("webdataset/00000.tar", "parquet/00000.parquet"):
        file = run / "export" / name
        data = bytearray(file.read_bytes())
        data[5000] ^= 1  # within an image
        file.write_bytes(data)
    damaged = sorted(line.split(" ")[0] for line in verify(run))
    assert damaged == ["export/parquet/00000.parquet", "export/webdataset/00000.tar"]


def test_an_export_lists_its_digests(run: Path) -> None:
    listed = (run / "export" / "index" / "SHA256SUMS").read_text().splitlines()
    written = [file.relative_to(run / "export") for file in (run / "export").rglob("*") if file.is_file()]
    assert sorted(line.split("  ")[1] for line in listed) == sorted(
        f"../{file}" for file in written if file.parts[0] != "index"
    )
