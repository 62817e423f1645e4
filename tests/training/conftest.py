"""Runs and models that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import begin, make
from tests.support.training_runs import make_grpo_sections, make_sft_sections


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with captions and verdicts; tests copy it."""
    folder = begin(tmp_path_factory.mktemp("sft") / "run", make_sft_sections())
    for stage in ("ingest", "caption", "score"):
        assert make(folder, stage).exit_code == 0
    return folder


@pytest.fixture(scope="session")
def grpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rubrics and scores; tests copy it."""
    folder = begin(tmp_path_factory.mktemp("grpo") / "run", make_grpo_sections())
    for stage in ("ingest", "caption", "rubric", "score"):
        assert make(folder, stage).exit_code == 0
    return folder


@pytest.fixture(scope="session")
def processor() -> Any:
    from stages.scenes import tiny_model

    return tiny_model.create_processor()
