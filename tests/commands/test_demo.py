"""What `recap demo` sets up; that the whole of it runs, `make demo` sees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline import config
from pipeline.commands import demo
from pipeline.engines import vllm
from pipeline.errors import ConfigError, RefusedError


def test_vllm_that_is_not_installed_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"kind 'vllm': `make vllm` installs it for a CPU"):
        demo.create_demo(tmp_path / "demo", engine="vllm")
    assert not (tmp_path / "demo").exists()


def test_the_manifest_on_vllm_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(demo.render_manifest(num_images=30, engine="vllm"))
    run = config.load(tmp_path)
    models = [Path(plugin.config.model).name for plugin in run.engines.values()]
    assert models == ["scenes-captioner", "scenes-judge"]
    assert all(isinstance(plugin.config, vllm.Config) for plugin in run.engines.values())
    assert run.source.config.num_images == 30


def test_a_demo_with_another_engine_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(demo.render_manifest(num_images=None, engine="vllm"))
    with pytest.raises(RefusedError, match=r"--engine transformers. wants a folder of its own"):
        demo.create_demo(tmp_path, engine="transformers")
