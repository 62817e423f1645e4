"""A run made by an earlier version is done, and its training set is written again with the same bytes.

The two runs in tests/data/earlier_runs were made at commit e362fd6, before modules moved and classes were renamed: one
over photographs of scikit-image with the engine `echo`, one over scenes with simulated teachers.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.runs import ROOT, recap

RUNS = ROOT / "tests" / "data" / "earlier_runs"
NUM_TABLES = {"photos": 26, "scenes": 20}


@pytest.fixture(params=sorted(NUM_TABLES))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(RUNS / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / str(request.param)


def test_an_earlier_run_is_done_and_nothing_is_stale(run: Path) -> None:
    passes = json.loads(recap("status", "--json", "--run", str(run)).stdout)
    assert sum(p["done"] for p in passes) == NUM_TABLES[run.name]
    assert {p["title"]: (p["num_missing"], p["stale"], p["reasons"]) for p in passes} == {
        p["title"]: (0, 0, []) for p in passes
    }


def test_running_an_earlier_run_again_makes_nothing(run: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(run)}
    done = [recap("run", stage, "--run", str(run)) for stage in ("all", "rubric", "score")]
    assert [result.returncode for result in done] == [0, 0, 0]
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(run)} == before


def test_an_earlier_training_set_is_written_again_with_the_same_bytes(run: Path) -> None:
    def exported() -> dict[str, bytes]:
        index = run / "export" / "index"  # its footers record the code version and the time
        found = [file for file in files(run / "export") if index not in file.parents]
        return {str(file.relative_to(run)): file.read_bytes() for file in found}

    before = exported()
    assert len(before) == 6
    shutil.rmtree(run / "export")
    assert recap("run", "export", "--run", str(run)).returncode == 0
    assert exported() == before


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
            assert rows(again / table) == rows(file), table


def rows(file: Path) -> pa.Table:
    """A table without the wording of its errors, and without footers."""
    table = pq.read_table(file)
    kept = [name for name in table.column_names if name != "error"]
    return table.select(kept).replace_schema_metadata(None)


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and ".work" not in file.parts)
