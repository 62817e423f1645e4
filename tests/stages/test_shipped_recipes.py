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


ABOUT = {
    "context": "Ada.",
    "instruction": "Who?",
    "language": "German",
    "place": "Rome",
    "seen": "STOP",
    "caption": "a",
}


def write_photographs(folder: Path, num: int) -> Path:
    folder.mkdir()
    for name, data in list(corpora.load_photographs().items())[:num]:
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".json").write_text(json.dumps(ABOUT))
    return folder


def begin_with_all(folder: Path, photos: Path, **changes: Any) -> Path:
    """A run with a caption pass for each recipe; `changes` are keys of each."""
    parts = {f"caption.{file.stem}": {**configure(file.stem), **changes} for file in FILES}
    draft = {"caption.draft": {"recipe": "short", "engine": "echo"}, "engines.echo": {"kind": "echo"}}
    return begin(folder, {**sections(photos), **draft, **parts, "score.judge": {"kind": "text"}})


@pytest.mark.slow
def test_every_recipe_captions_every_photograph(tmp_path: Path) -> None:
    run = begin_with_all(tmp_path / "run", write_photographs(tmp_path / "photos", NUM_PHOTOS))
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


@pytest.mark.slow
def test_a_real_model_takes_the_prompts_of_every_recipe(tmp_path: Path, tiny_model: Path) -> None:
    """It is untrained, so that its answers may be no JSON or have no end, but none of its requests fails."""
    run = begin_with_all(
        tmp_path / "run",
        write_photographs(tmp_path / "photos", 2),
        engine="untrained",
        max_tokens=16,
        ladder=[],
        max_error_share=1.0,
    )
    toml = (run / "run.toml").read_text()
    (run / "run.toml").write_text(f"{toml}\n[engines.untrained]\nkind = 'transformers'\nmodel = '{tiny_model}'\n")
    make(run, "ingest")
    assert make(run, "caption").exit_code == 0
    for file in FILES:
        (path,) = (run / "caption" / file.stem).glob("*.parquet")
        rows = list(tables.read_rows(path, Caption))
        assert len(rows) == 2 and all(row.num_prompt_tokens and row.num_output_tokens for row in rows), file.stem
        assert {row.status for row in rows} <= {"ok", "truncated", "repeated", "invalid", "empty"}, file.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_recipe_says_where_it_comes_from(file: Path) -> None:
    header = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
