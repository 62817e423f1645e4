"""System calls in order: a file is on disk before it gets its name, and its directory is synced after that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

pytestmark = pytest.mark.slurm  # strace comes with the same packages

WRITE = """
import sys
from pathlib import Path
from pipeline.records import Score
from pipeline.storage import tables

values = {"value": 0.5, "criteria": (), "status": "ok", "error": None}
score = Score(key="000000000000", caption="dense", candidate=0, name="judge", **values)
provenance = tables.Provenance(stage="score", name="judge", version=1, slice={}, inputs={})
tables.write_rows(Path(sys.argv[1]) / "a.parquet", Score, [score], provenance)
"""


def test_write_fsync_rename_fsync_of_the_folder(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    calls = "trace=openat,write,fsync,rename,renameat,renameat2"
    folder = tmp_path / "run"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", log, sys.executable, "-c", WRITE, folder],
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    seen = []
    for line in log.read_text().splitlines():
        if call := re.match(r"\d+ +(write|fsync)\(\d+<([^>]*)>", line):
            name = "folder" if call[2] == str(folder) else "file" if call[2].endswith(".tmp") else ""
            seen.append(f"{call[1]} {name}" if name else "")
        elif re.match(r"\d+ +rename", line) and "a.parquet" in line:
            seen.append("rename")
    order = [call for call, before in zip(seen, ["", *seen], strict=False) if call and call != before]
    assert order == ["write file", "fsync file", "rename", "fsync folder"]
