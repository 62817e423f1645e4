"""The end of `recap run all`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.runs import begin, corpus, recap, sections, write


@pytest.mark.slow
def test_a_run_ends_with_its_yield_and_one_with_nothing_to_do_names_the_command(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 4 + ["cut"])
    run = begin(tmp_path / "run", sections(photos, export={"formats": ["webdataset"]}))
    first, second = (recap("run", "all", "--run", run).stderr for _ in range(2))
    assert "passed every rule of the filter" in first and "recap query yield" not in first
    assert "passed every rule of the filter" not in second and f"recap query yield --run {run}" in second
    for shown in (first, second):
        assert str(run / "export" / "webdataset") in shown and f"recap report --run {run}" in shown


@pytest.mark.slow
def test_a_run_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 2)
    run = begin(tmp_path / "run", sections(photos, filter={"rules": {"never": "judge > 2"}}))
    shown = recap("run", "all", "--run", run).stderr
    assert "NO CAPTION WAS KEPT" in shown and "refused:   never (2)" in shown


@pytest.mark.slow
def test_what_curation_dropped_is_counted_and_an_earlier_form_is_marked(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 4)
    shutil.copy(photos / "00001.jpg", photos / "00009.jpg")
    parts = sections(photos, curate={"max_distance": 0}, export={"formats": ["webdataset"]}, filter={"rules": {}})
    run = begin(tmp_path / "run", parts)
    first = recap("run", "all", "--run", run).stderr
    assert re.search(r"usable +5 .*\n +selected +4 .*recap query curation.*\n +captioned +4 ", first)
    write(run, {**parts, "export": {"formats": ["parquet"]}})
    second = recap("run", "all", "--stale", "redo", "--run", run).stderr
    assert f"  {run}/export/parquet\n" in second
    assert "export/webdataset is removed" in second and not (run / "export/webdataset").exists()
