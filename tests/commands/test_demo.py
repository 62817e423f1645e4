"""The setup of `recap demo`; `make demo` runs all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from pipeline import config
from pipeline.commands import demo
from pipeline.engines import vllm
from pipeline.errors import ConfigError, RefusedError
from pipeline.sources import scenes
from stages.scenes import claims


def test_missing_vllm_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"kind 'vllm': for a CPU: make vllm"):
        demo.create_demo(tmp_path / "demo", engine="vllm")
    assert not (tmp_path / "demo").exists()


def test_manifest_for_vllm_is_valid(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(demo.render_manifest(num_images=30, engine="vllm"))
    run = config.load(tmp_path)
    models = [Path(plugin.config.model).name for plugin in run.engines.values()]
    assert models == ["scenes-captioner", "scenes-judge"]
    assert all(isinstance(plugin.config, vllm.Config) for plugin in run.engines.values())
    assert run.source.config.num_images == 30


def test_demo_with_another_engine_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(demo.render_manifest(num_images=None, engine="vllm"))
    with pytest.raises(RefusedError, match=r"use another directory for `recap demo DIR --engine transformers"):
        demo.create_demo(tmp_path, engine="transformers")


def test_accuracy_is_measured_by_the_module_of_the_manifest() -> None:
    key, scene = "scenes/7/3", scenes.find_scene("scenes/7/3")
    complete = claims.write_caption(claims.list_facts(scene), Random(0))
    rows = list(demo.measure_accuracy([(key, "", complete, True), (key, "", complete, False)]))
    assert [row.split()[:2] for row in rows] == [["the", "alt"], ["all", "captions"], ["kept", "captions"]]
    assert rows[1].split()[2:] == rows[2].split()[2:] == ["100.0%", "100.0%", "0.00", "each"]
    assert rows[0].split()[3:] == ["0.0%", "0.0%", "0.00", "each"]
