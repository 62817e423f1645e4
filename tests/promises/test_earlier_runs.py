"""A run made by an earlier version is done, and its training set is written again with the same bytes.

The two runs in tests/data/earlier_runs were made at commit e362fd6, before modules moved and classes were renamed: one
over photographs of scikit-image with the engine `echo`, one over scenes with simulated teachers.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import Exported
from pipeline.storage import tables
from stages.exporters import webdataset
from tests.support.runs import ROOT, recap

RUNS = ROOT / "tests" / "data" / "earlier_runs"
NUM_TABLES = {"photos": 26, "scenes": 20}


@pytest.fixture(params=sorted(NUM_TABLES))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(RUNS / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / str(request.param)


@pytest.mark.slow
def test_an_earlier_run_is_done_and_nothing_is_stale(run: Path) -> None:
    passes = json.loads(recap("status", "--json", "--run", str(run)).stdout)
    assert sum(p["done"] for p in passes) == NUM_TABLES[run.name]
    assert {p["title"]: (p["num_missing"], p["stale"], p["reasons"]) for p in passes} == {
        p["title"]: (0, 0, []) for p in passes
    }


@pytest.mark.slow
def test_running_an_earlier_run_again_makes_nothing(run: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(run)}
    done = [recap("run", stage, "--run", str(run)) for stage in ("all", "rubric", "score")]
    assert [result.returncode for result in done] == [0, 0, 0]
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(run)} == before


@pytest.mark.slow
def test_an_earlier_training_set_is_written_again_with_the_same_bytes(run: Path) -> None:
    """But for what was added since: columns, lines of the card, Croissant metadata, and the indexes of the tars."""

    def exported() -> dict[str, bytes]:
        index = run / "export" / "index"  # its footers record the code version and the time
        found = [file for file in files(run / "export") if index not in file.parents]
        return {str(file.relative_to(run)): file.read_bytes() for file in found}

    before = exported()
    assert len(before) == 6
    shutil.rmtree(run / "export")
    assert recap("run", "export", "--run", str(run)).returncode == 0
    after = exported()
    added = {name.removeprefix("export/webdataset/") for name in after.keys() - before.keys()}
    assert {name for name in added if not re.fullmatch(r"\d{5}\.tar\.idx", name)} == {
        *webdataset.INDEXES,
        "export/croissant.json",
    }
    for name, data in before.items():
        assert drop_added(name, after[name], data) == drop_added(name, data, data), name


def drop_added(name: str, data: bytes, earlier: bytes) -> Any:
    """The content of an exported file without the columns and lines that an earlier one lacks."""
    if name.endswith(".parquet"):
        columns = pq.read_schema(BytesIO(earlier)).names
        return pq.read_table(BytesIO(data), columns=columns).replace_schema_metadata(None)
    if name.endswith(".md"):
        return [line for line in data.splitlines() if line in earlier.splitlines()]
    return list_members(data, earlier) if name.endswith(".tar") else data


def list_members(data: bytes, earlier: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=BytesIO(earlier)) as tar:
        columns = json.loads(next(read(tar, name) for name in tar.getnames() if name.endswith(".json"))).keys()
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        members = [(name, read(tar, name)) for name in tar.getnames()]
    rows = [json.loads(member) for name, member in members if name.endswith(".json")]
    kept = [json.dumps({key: row[key] for key in columns}, ensure_ascii=False).encode() for row in rows]
    others = [(name, member) for name, member in members if not name.endswith(".json")]
    return [*others, *(("json", text) for text in kept)]


def read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file
    return file.read()


@pytest.mark.slow
def test_an_earlier_training_set_verifies_and_its_new_columns_are_empty(run: Path) -> None:
    assert recap("verify", "--run", run).stdout == ""
    queried = recap("sql", "SELECT DISTINCT orientation FROM export", "--run", run, "--format", "json").stdout
    assert json.loads(queried) == [{"orientation": None}]
    (row, *_) = tables.read_rows(run / "export" / "index" / "00000.parquet", Exported)
    assert (row.orientation, row.reencoded, row.written_sha256) == (1, "", "")


def test_a_training_set_that_mixes_versions_is_announced(run: Path) -> None:
    for path in (run / "export").glob("*/00001.*"):
        path.unlink()
    assert "loaders refuse such a mixture" in recap("run", "export", "--run", run).stderr


@pytest.mark.slow
def test_making_an_earlier_run_from_nothing_gives_the_same_rows(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.toml", "plan.parquet", "images"):
        if (run / name).is_dir():
            shutil.copytree(run / name, again / name)
        elif (run / name).exists():
            shutil.copy2(run / name, again / name)
    for stage in ("all", "rubric", "score"):
        recap("run", stage, "--run", str(again))
    for file in run.rglob("*.parquet"):
        table = file.relative_to(run)
        if table.parts[0] != "stats":
            columns = [name for name in pq.read_schema(file).names if name != "error"]  # their wording changes
            assert rows(again / table, columns) == rows(file, columns), table


def rows(file: Path, columns: list[str]) -> pa.Table:
    return pq.read_table(file, columns=columns).replace_schema_metadata(None)


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and ".work" not in file.parts)
