"""Each recipe that ships makes captions of photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Caption, ChainedCaption
from pipeline.storage import tables
from stages import recipes
from tests.support import corpora
from tests.support.runs import ROOT, begin, make, sections

FILES = sorted((ROOT / "stages" / "recipes").glob("*.toml"))
EARLIER = ("caption", "captions")  # fields that are captions of another pass
NUM_PHOTOS = 4


def configure(name: str) -> dict[str, Any]:
    """The section of a caption pass that fills each field of a recipe, by name of the field."""
    fields = recipes.load_any(name, run=None).fields - {recipes.ALT_TEXT}
    metadata = {field: f"metadata->>'$.{field}'" for field in fields}
    given = metadata | dict.fromkeys(fields & {*EARLIER}, "SELECT key, text FROM draft")
    return {"recipe": name, "engine": "captioner", **({"given": given} if given else {})}


@pytest.mark.slow
def test_every_recipe_captions_every_photograph(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    about = {
        "context": "Ada.",
        "instruction": "Who?",
        "language": "German",
        "place": "Rome",
        "seen": "STOP",
        "caption": "a",
    }
    for name, data in list(corpora.load_photographs().items())[:NUM_PHOTOS]:
        (tmp_path / "photos" / name).write_bytes(data)
        (tmp_path / "photos" / name).with_suffix(".json").write_text(json.dumps(about))
    parts = {f"caption.{file.stem}": configure(file.stem) for file in FILES}
    draft = {"caption.draft": {"recipe": "short", "engine": "captioner"}}
    run = begin(tmp_path / "run", {**sections(tmp_path / "photos"), **draft, **parts, "score.judge": {"kind": "text"}})
    make(run, "ingest")
    assert make(run, "caption").exit_code == 0
    for file in FILES:
        (path,) = (run / "caption" / file.stem).glob("*.parquet")
        rows = list(tables.read_rows(path, Caption))
        assert [row.status for row in rows] == ["ok"] * NUM_PHOTOS, file.stem
        assert len({row.text for row in rows}) > 1
        recipe = recipes.load_any(file.stem, run=None)
        is_structured = isinstance(recipe, recipes.Recipe) and bool(recipe.schema)
        assert {bool(row.fields) for row in rows} == {is_structured}
        if isinstance(recipe, recipes.ChainRecipe):
            names = [step.name for step in recipe.steps]
            for row in tables.read_rows(path, ChainedCaption):
                assert sorted({step.name for step in row.steps}, key=names.index) == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_recipe_says_where_it_comes_from(file: Path) -> None:
    header = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
