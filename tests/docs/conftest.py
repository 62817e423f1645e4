"""The small run that the documentation's commands, SQL and TOML fragments are tried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import init
from tests.support.pages import list_blocks
from tests.support.runs import corpus, make, recap

CAPTIONS = ("dense", "headline", "short", "student", "one", "two", "three")
ENGINES = ("captioner", "judge", "writer", "student", "large")
BASE: dict[str, Any] = {
    "source": {"kind": "folder", "path": "/data/photos", "shard_size": 5},
    "engines": {name: {"kind": "echo"} for name in ENGINES},
    "caption": {name: {"recipe": "dense", "engine": "captioner"} for name in CAPTIONS},
    "score": {"form": {"kind": "text"}, "judge": {"kind": "judge", "engine": "judge", "captions": ["dense"]}},
    "filter": {"rules": {"well_formed": "form > 0.3"}},
    "export": {},
}


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key; a changed plugin section replaces the old one."""
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        both = isinstance(change, dict) and isinstance(old, dict) and "kind" not in change
        merged[name] = merge(old, change) if both else change  # type: ignore[arg-type]
    return merged


def plain_engines(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same run with the engine `echo` for every model."""
    return {**values, "engines": {name: {"kind": "echo"} for name in values["engines"]}}


def as_toml(values: Mapping[str, Any]) -> str:
    scalars = {name: value for name, value in values.items() if not isinstance(value, dict)}
    lines = [f"{name} = {init.format_toml(value)}" for name, value in scalars.items()]
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{json.dumps(name)} = {init.format_toml(value)}"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def documented_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with photos/ and runs/photos, which has every pass that the documentation mentions."""
    home = tmp_path_factory.mktemp("home")
    photos = corpus(home / "photos", ["jpg", "png", "cut", "webp", "jpg", "empty", "jpg"])
    rubric = {"committee": {"teachers": ["one", "two", "three"], "student": "dense", "writer": "claims"}}
    changes = {
        "find": {"faults": {"kind": "quality"}, "signs": {"kind": "asked", "engine": "judge", "question": "signs"}},
        "curate": {},
        "canary": {},
        "source": {**BASE["source"], "path": str(photos)},
        "caption": {name: {"recipe": name, "engine": "captioner"} for name in ("headline", "checked")},
        "rubric": rubric,
        "score": {"committee": {"kind": "rubric", "rubric": "committee", "captions": ["dense"]}},
    }
    run = home / "runs" / "photos"
    for block in list_blocks("toml"):
        if block.file:
            target = home / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
    (run / "run.toml").write_text(as_toml(merge(BASE, changes)))
    recap("plan", "--run", run)
    assert make(run).exit_code == 0
    return home


@pytest.fixture
def home(documented_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that directory, the current one and the user's home."""
    copy = tmp_path / "home"
    shutil.copytree(documented_run, copy)
    file = copy / "runs" / "photos" / "run.toml"
    file.write_text(file.read_text().replace(str(documented_run), str(copy)))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(copy))
    return copy
