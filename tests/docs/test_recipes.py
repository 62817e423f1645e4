"""The worked examples of docs/recipes-and-rubrics.md: each mechanism makes captions on photographs with metadata."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from pipeline.records import Caption, Verdict
from pipeline.storage import tables
from tests.docs.conftest import BASE, as_toml, merge
from tests.support import corpora
from tests.support.pages import Block, list_blocks
from tests.support.runs import ROOT, make, recap

PAGE = ROOT / "docs" / "recipes-and-rubrics.md"
MECHANISMS = ("words", "given", "filter", "engines")  # the last: of the steps of a chain
NUM_PHOTOS = 4
METADATA = {"place": "Rome", "captions": ["a", "b"], "article": "Ada Byron visits.", "question": "Who is it?"}


def list_mechanisms(block: Block) -> set[str]:
    """Those that a block is the example of."""
    values = tomllib.loads(block.text)
    found = {key for section in values.get("caption", {}).values() for key in section if key in MECHANISMS}
    return found | ({"filter"} if "captions" in values.get("filter", {}) else set())


EXAMPLES = [block for block in list_blocks("toml", pages=(PAGE,)) if not block.file and list_mechanisms(block)]


def test_each_mechanism_has_an_example() -> None:
    assert set().union(*map(list_mechanisms, EXAMPLES)) == {*MECHANISMS}


def test_each_recipe_that_ships_is_documented() -> None:
    files = (ROOT / "stages" / "recipes").glob("*.toml")
    assert [file.stem for file in files if f"| `{file.stem}` |" not in PAGE.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.id)
def test_examples_run_on_photographs(block: Block, tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for name, data in list(corpora.load_photographs().items())[:NUM_PHOTOS]:
        (photos / name).write_bytes(data)
        (photos / name).with_suffix(".json").write_text(json.dumps({**METADATA, "caption": f"the photo {name}"}))
    for other in list_blocks("toml"):
        if other.file:
            target = run / Path(other.file).parent.name / Path(other.file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(other.text)
    values = tomllib.loads(block.text)
    source = {"kind": "folder", "path": str(photos)}
    (run / "run.toml").write_text(as_toml(merge({**BASE, "source": source}, values)))
    recap("plan", "--run", run)
    assert make(run).exit_code == 0
    for name in values.get("caption", {}):
        (path,) = (run / "caption" / name).glob("*.parquet")
        rows = list(tables.read_rows(path, Caption))
        usable = {row.key for row in rows if row.status == "ok"}
        # of a repaired caption nothing may be left: the judge `echo` refuses at random
        assert usable == {row.key for row in rows} or ("without_refused" in block.text and usable)
        assert len({row.key for row in rows}) == NUM_PHOTOS
    verdicts = tables.read_rows(next((run / "verdict").glob("*.parquet")), Verdict)
    competing = values.get("filter", {}).get("captions") or {*BASE["caption"], *values["caption"]}
    assert {row.caption for row in verdicts} == set(competing)
