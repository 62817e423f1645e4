"""The examples of docs/extending.md, run as they are written."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, plugins
from pipeline.errors import ConfigError
from tests.docs.conftest import BASE, as_toml, merge
from tests.support.pages import list_blocks
from tests.support.runs import ROOT, make, picture, recap

PAGE = (ROOT / "docs" / "extending.md",)
REGISTRIES = {  # example -> the package whose directory would make it a plugin without a dot
    "zips": "pipeline.sources",
    "colours": "pipeline.engines",
    "bars": "stages.finders",
    "keywords": "stages.scorers",
    "jsonl": "stages.exporters",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the import path with the page's modules, and a run's directory with its recipes and rubrics."""
    for block in list_blocks("python", "toml", pages=PAGE):
        if block.file:
            file = tmp_path / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_recap"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.fixture
def zips(tmp_path: Path) -> Path:
    folder = tmp_path / "zips"
    folder.mkdir()
    for number in range(2):
        with zipfile.ZipFile(folder / f"{number}.zip", "w") as archive:
            for image in range(3):
                archive.writestr(f"{image}.jpg", picture(10 * number + image))
            archive.writestr("0.txt", "A mostly green picture")
            archive.writestr("readme.md", "not an image")
    return folder


def begin(project: Path, zips: Path) -> Path:
    """The run of all examples together."""
    values: dict[str, Any] = {**BASE, "caption": {}, "score": {"form": {"kind": "text"}}}
    for block in list_blocks("toml", pages=PAGE):
        if not block.file:
            values = merge(values, tomllib.loads(block.text))
    values["source"]["path"] = str(zips)
    run = project / "runs" / "photos"
    (run / "run.toml").write_text(as_toml(values))
    recap("plan", "--run", run)
    return run


def query(run: Path, sql: str) -> list[list[Any]]:
    return [list(row.values()) for row in json.loads(recap("sql", sql, "--run", run, "--format", "json").stdout)]


def test_the_source_gives_a_row_for_what_cannot_be_read(project: Path, tmp_path: Path) -> None:
    zips = plugins.load("pipeline.sources", "my_recap.zips")
    with zipfile.ZipFile(tmp_path / "0.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", picture(0))
        archive.writestr("b.jpg", picture(1))
    packed = (tmp_path / "0.zip").read_bytes()
    (tmp_path / "0.zip").write_bytes(packed[:60] + bytes(20) + packed[80:])  # within the data of the first member
    (tmp_path / "1.zip").write_bytes(b"not an archive")
    source = zips.Config(path=str(tmp_path))
    rows = [list(zips.read(piece, source)) for piece in zips.pieces(source)]
    assert [[row.data is None for row in piece] for piece in rows] == [[True, False], [True]]
    assert all(bool(row.error) == (row.data is None) for piece in rows for row in piece)


@pytest.mark.parametrize("name", REGISTRIES)
def test_examples_pass_lint_where_built_in_ones_are(name: str) -> None:
    (block,) = [block for block in list_blocks("python", pages=PAGE) if Path(block.file or "").stem == name]
    place = ROOT / REGISTRIES[name].replace(".", "/") / f"{name}.py"
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--stdin-filename", str(place), "-"]
    result = subprocess.run(command, input=block.text, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_all_examples_make_one_run(project: Path, zips: Path) -> None:
    run = begin(project, zips)
    assert make(run).exit_code == 0
    images = query(run, "SELECT source_key, status, alt_text FROM image ORDER BY key")
    captions = query(run, "SELECT text FROM caption WHERE name = 'colours'")
    rounds = query(run, "SELECT [one.name FOR one IN steps] FROM caption WHERE name = 'rounds'")
    of_others = "name = 'keywords' AND caption <> 'rounds'"
    keywords = query(run, f"SELECT status, count(*) FROM score WHERE {of_others} GROUP BY ALL ORDER BY ALL")
    criteria = query(run, "SELECT DISTINCT unnest(criteria).id FROM score WHERE name = 'headline' ORDER BY ALL")
    exported = query(run, "SELECT key || '.jpg', sha256, caption FROM export ORDER BY key")
    bars = query(run, "SELECT label, confidence, (x1 - x0) * (y1 - y0) FROM found WHERE name = 'frame'")
    looked = query(run, "SELECT status, len(found) FROM finding WHERE name = 'frame'")
    assert images[0] == ["0.zip/0.jpg", "ok", "A mostly green picture"]
    assert images[1] == ["0.zip/1.jpg", "ok", None]
    assert len(images) == 6
    assert all(label == "bars" and share == pytest.approx(1 - inner, abs=1e-3) for label, share, inner in bars)
    assert len(looked) == 6 and sum(num for _, num in looked) == len(bars) > 0
    assert all(text.startswith("This picture is mostly ") for (text,) in captions)
    assert all(names == ["draft"] + ["more"] * (len(names) - 1) and len(names) > 2 for (names,) in rounds)
    assert keywords == [["ok", 4], ["unknown", 8]]
    assert criteria == [["subject"], ["true"]]
    lines = [line for file in sorted((run / "export" / "jsonl").iterdir()) for line in file.read_text().splitlines()]
    assert [list(json.loads(line).values()) for line in lines] == exported
    assert exported


@pytest.mark.slow
def test_a_finished_run_with_examples_is_done_and_notices_changes(project: Path, zips: Path) -> None:
    run = begin(project, zips)
    assert make(run).exit_code == 0
    assert make(run).done == 0
    file = run / "run.toml"
    file.write_text(file.read_text().replace('"This picture is mostly"', '"Mostly"'))
    assert make(run, stale="redo").done > 0


def test_keys_of_examples_are_checked(project: Path, zips: Path) -> None:
    run = begin(project, zips)
    file = run / "run.toml"
    file.write_text(file.read_text().replace("min_letters = 5", "min_letters = 0"))
    with pytest.raises(ConfigError, match=r"score\.keywords\.min_letters"):
        config.load(run)


def test_a_source_claims_its_corpus(project: Path, zips: Path) -> None:
    source = plugins.load("pipeline.sources", "my_recap.zips")
    assert source.claims(str(zips))
    assert not source.claims(str(project / "nowhere"))


@pytest.mark.parametrize(("name", "package"), REGISTRIES.items())
def test_an_example_in_a_plugin_directory_needs_no_dot(
    project: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(package, fromlist=["__path__"])
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(project / "my_recap")])
    assert name in plugins.list_names(package)
    assert plugins.load(package, name).__name__ == f"{package}.{name}"
    monkeypatch.delitem(sys.modules, f"{package}.{name}")
    monkeypatch.delattr(module, name)


@pytest.mark.slow
def test_init_takes_a_source_of_ones_own(project: Path, zips: Path) -> None:
    recap("init", project / "run", "--source", zips, "--kind", "my_recap.zips")
    recap("run", "ingest", "--run", project / "run")
    assert query(project / "run", "SELECT count(*) FROM image WHERE status = 'ok'") == [[6]]
