"""`recap compare`: two runs or two passes, measured and image by image, joined by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import begin, corpus, make, recap, sections

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs over the same pictures, of which the second has other names, one more and stricter rules."""
    home = tmp_path_factory.mktemp("compare")
    photos = corpus(home / "photos", ["jpg", "png", "cut", "webp", "jpg"])
    short = {"caption__short": {"recipe": "short", "engine": "captioner"}}
    assert make(begin(home / "a", sections(photos, filter={"rules": {}}, **short))).exit_code == 0
    corpus(home / "photos2", ["jpg"], first=9)
    for file in photos.glob("*.*"):
        shutil.copy(file, home / "photos2" / f"other_{file.name}")
    parts = sections(home / "photos2", filter={"rules": {"judged": "judge >= 0.6"}})
    assert make(begin(home / "b", parts)).exit_code == 0
    return home


def compare(home: Path, a: str, b: str, *arguments: object) -> Any:
    return json.loads(recap("compare", f"{home}/{a}", f"{home}/{b}", "--format", "json", *arguments).stdout)


def test_two_runs_are_measured_over_the_images_that_both_have(home: Path) -> None:
    rows = {row["measure"]: row for row in compare(home, "a", "b")}
    assert (rows["images"]["a"], rows["images"]["b"], rows["images"]["change"]) == (4, 5, 1)
    assert rows["share kept"]["a"] == 1 and rows["share kept"]["b"] < 1
    assert rows["words"]["pairs"] == rows["score form"]["pairs"] == 4
    assert 0 <= rows["score judge"]["a"] <= 1


def test_two_passes_are_compared_image_by_image(home: Path) -> None:
    rows = compare(home, "a:dense", "a:short", "--samples", 10)
    assert len({row["sha256"] for row in rows}) == len(rows) == 4
    assert all(row["text_a"] != row["text_b"] and row["source_key"] for row in rows)
    assert all(row["words_a"] == len(row["text_a"].split()) for row in rows)
    gaps = [sum(abs(row[f"{name}_a"] - row[f"{name}_b"]) for name in ("form", "judge")) for row in rows]
    assert gaps == sorted(gaps, reverse=True)
    assert recap("compare", f"{home}/a:dense", f"{home}/a:dense").stdout.count("4") > 3


def test_what_cannot_be_compared_is_refused(home: Path, tmp_path: Path) -> None:
    done = recap("compare", f"{home}/a:none", f"{home}/b", check=False)
    assert done.returncode == 2 and "there is no caption pass 'none'; there are dense, short" in done.stderr
    assert make(begin(tmp_path / "c", sections(corpus(tmp_path / "p", ["png"], first=50)))).exit_code == 0
    done = recap("compare", f"{home}/a", tmp_path / "c", check=False)
    assert done.returncode == 2 and "joined by their sha256" in done.stderr
