"""The JSON Schema of run.toml accepts what is read, and refuses what is not."""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stages.text.json_schema import find_problem
from tests.support.runs import ROOT, recap

MANIFESTS = sorted((ROOT / "manifests").glob("*/run.toml"))
SOURCE = "[source]\nkind = 'folder'\npath = 'x'\n"


@cache
def schema() -> dict[str, Any]:
    printed: dict[str, Any] = json.loads(recap("schema").stdout)
    return printed


def accepts(part: dict[str, Any], value: Any) -> bool:
    """Whether a value follows the part of JSON Schema that `recap schema` uses."""
    if "anyOf" in part and not any(accepts(choice, value) for choice in part["anyOf"]):
        return False
    if "pattern" in part and not re.search(part["pattern"], value):
        return False
    if not isinstance(value, dict) or part.get("type", "object") != "object":
        return not find_problem(value, {word: rest for word, rest in part.items() if word != "anyOf"})
    known, more = part.get("properties", {}), part.get("additionalProperties", True)
    return set(part.get("required", [])) <= set(value) and all(
        accepts(known[name], one) if name in known else accepts(more, one) if isinstance(more, dict) else more
        for name, one in value.items()
    )


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.parent.name)
def test_every_manifest_follows_the_schema(file: Path) -> None:
    assert accepts(schema(), tomllib.loads(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[source]\nkind = 'folder'",
        "[source]\nkind = 'foldr'\npath = 'x'",
        SOURCE + "shard_size = 0",
        SOURCE + "shard_size = 'many'",
        SOURCE + "pth = 'y'",
        "sed = 1\n" + SOURCE,
        SOURCE + "[engines.a]\nkind = 'echo'\nmodl = 'm'",
        SOURCE + "[score.a]\nkind = 'text'\nmin_wrds = 3",
        SOURCE + "[train]\nmethod = 'sft'\ngroup_size = 4",
        SOURCE + "[slurm.caption]\ngpu = 1",
        SOURCE + "[slurm.server]\nworkers = 1",
    ],
)
def test_what_cannot_be_read_does_not_follow_the_schema(text: str) -> None:
    assert not accepts(schema(), tomllib.loads(text))


def test_plugins_of_ones_own_are_accepted() -> None:
    assert accepts(schema(), tomllib.loads(SOURCE + "[score.a]\nkind = 'my.scorer'\nany = 1"))


def test_an_editor_shows_help_defaults_and_bounds() -> None:
    (folder,) = (one for one in schema()["properties"]["source"]["anyOf"] if one.get("title") == "folder")
    shard_size = folder["properties"]["shard_size"]
    assert (shard_size["type"], shard_size["default"], shard_size["minimum"]) == ("integer", 1000, 1)
    assert "images per shard" in shard_size["description"]
