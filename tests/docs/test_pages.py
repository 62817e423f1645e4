"""README and docs: size, links, generated parts, TOML and SQL."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from pipeline.storage.database import RECORDS
from stages import recipes, rubrics
from stages.finders import _questions as finder_questions
from tests.docs.conftest import BASE, as_toml, merge, plain_engines
from tests.support import reference
from tests.support.pages import PAGES, Block, list_anchors, list_blocks, list_links
from tests.support.runs import ROOT, begin, corpus, files, make, recap, sections

README = ROOT / "README.md"
MAX_README = 8192  # bytes
TOML_BLOCKS = list_blocks("toml")


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= MAX_README


def test_the_readme_links_every_page() -> None:
    assert {f"docs/{page.name}" for page in PAGES if page != README} <= set(list_links(README))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in list_links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in list_anchors(target), link


def test_modules_and_make_targets_exist() -> None:
    text = "".join(page.read_text() for page in (*PAGES, ROOT / "CHANGELOG.md"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_python_names_exist() -> None:
    renamed = re.findall(r"^\| .* \| (`.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    text = (ROOT / "docs" / "extending.md").read_text() + "\n".join(line.partition(";")[0] for line in renamed)
    names = re.findall(r"`((?:pipeline|stages)(?:\.\w+)+)`", text)
    assert len(names) > 10
    assert [name for name in names if not is_importable(name)] == []


def is_importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_security_page_names_tests_that_exist() -> None:
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert names
    for file, name in names:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_configuration_page_is_generated_from_the_code() -> None:
    """A new plugin may be missing from the page until `make docs` adds it; what the page has is up to date."""
    page = reference.CONFIGURATION.read_text()
    parts = [part for part in reference.configuration_parts() if f"\n{'#' * part.level} {part.title}\n" in page]
    assert {"Top level", "`[source]`", "`[filter]`", "`[export]`", "`[slurm]`"} <= {part.title for part in parts}
    assert page == reference.render_configuration(parts), "run `make docs`"


def test_columns_are_generated_from_the_code() -> None:
    page = reference.TABLES.read_text()
    assert page == reference.replace_tables(page), "run `make docs`"


def test_every_view_and_named_query_is_documented() -> None:
    page = reference.TABLES.read_text()
    queries = [file.stem for file in (ROOT / "manifests" / "queries").glob("*.sql")]
    assert all(f"| `{record.table}` |" in page for record in RECORDS)
    assert all(f"| `recap query {name}` |" in page for name in queries)


def test_every_command_is_in_the_readme() -> None:
    for command in app.registered_commands:
        assert command.callback
        assert f"`recap {command.name or command.callback.__name__}" in README.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("block", TOML_BLOCKS, ids=lambda block: block.id)
def test_toml_parses_as_what_it_is(block: Block, tmp_path: Path, documented_run: Path) -> None:
    values = tomllib.loads(block.text)
    if "my_recap." in block.text:
        return  # run by test_extending
    if block.file:
        folder, name = Path(block.file).parent.name, Path(block.file).stem
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.toml").write_text(block.text)
        load = {"recipes": recipes.load_any, "rubrics": rubrics.load, "finders": finder_questions.load}[folder]
        load(name, run=tmp_path)
        return
    for other in TOML_BLOCKS:
        if other.file:
            target = tmp_path / Path(other.file).parent.name / Path(other.file).name
            target.parent.mkdir(exist_ok=True)
            target.write_text(other.text)
    (tmp_path / "run.toml").write_text(as_toml(merge(BASE, values)))
    shutil.copy(documented_run / "runs" / "photos" / "plan.parquet", tmp_path)
    assert "caption:dense" in recap("status", "--run", tmp_path).stdout


@pytest.mark.slow
def test_the_full_run_toml_runs(tmp_path: Path) -> None:
    (block,) = list_blocks("toml", pages=(README,))
    values: dict[str, Any] = plain_engines(tomllib.loads(block.text))
    values["source"]["path"] = str(corpus(tmp_path / "photos", ["jpg", "png", "cut", "webp"]))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text(as_toml(values))
    recap("plan", "--run", run)
    assert make(run).exit_code == 0
    written = files(run)
    assert {"image/00000.parquet", "verdict/00000.parquet", "export/README.md", "export/stats.json"} <= written.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["true", "key NOT LIKE '000001%'"])
def test_the_loading_lines_of_the_readme_load_all_samples(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards of several formats, in the form that is the default; of the middle one nothing may be kept."""
    photos = corpus(tmp_path / "photos", ["jpg", "png", "jpg", "webp", "jpg", "jpg"])
    parts = {**sections(photos, source={"shard_size": 2}, filter={"rules": {"r": rule}}), "export": {}}
    assert make(begin(tmp_path / "runs" / "photos", parts)).exit_code == 0
    monkeypatch.chdir(tmp_path)
    (block,) = list_blocks("python", pages=(README,))
    *before, last = ast.parse(block.text).body
    names: dict[str, Any] = {}
    exec(compile(ast.Module(before, []), "README.md", "exec"), names)
    pairs = eval(ast.unparse(last), names)
    assert sorted(picture.size for picture, _ in pairs) == [(40, 30)] * (6 if rule == "true" else 4)


@pytest.mark.parametrize("block", list_blocks("sql"), ids=lambda block: block.id)
def test_sql_runs(block: Block, documented_run: Path) -> None:
    printed = recap("sql", block.text, "--run", documented_run / "runs" / "photos", "--format", "json").stdout
    assert json.loads(printed)
