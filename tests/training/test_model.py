"""The model that a training begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import config
from stages.training.model import load_model
from tests.support.runs import ROOT


@pytest.mark.slow
def test_weights_are_saved_in_the_type_in_which_they_came(tmp_path: Path) -> None:
    import torch

    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    run = config.load(tmp_path)
    _, processor, save_dtype = load_model(run, run.sections["train"][""], generates=True)
    assert save_dtype == torch.bfloat16
    assert processor.tokenizer.padding_side == "left"
