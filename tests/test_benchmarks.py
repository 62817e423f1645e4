"""The arms of benchmarks/miniature are valid, recorded ones are not trained again, and the adversary finds nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import adversary, miniature
from benchmarks.held_out import list_scenes
from pipeline import config
from stages.training.settings import TrainConfig
from tests.support.runs import ROOT


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, TrainConfig | None]:
    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    return dict(miniature.make_arms(config.load(tmp_path).sections["train"][""]))


def test_every_arm_learns_from_the_same_number_of_samples(arms: dict[str, TrainConfig | None]) -> None:
    num_samples = {arm: one.steps * one.batch_size for arm, one in arms.items() if one is not None}
    assert num_samples.pop("one mark") * 4 == num_samples["rubrics"]
    assert set(num_samples.values()) == {51200}


def test_recorded_arms_have_the_digest_of_the_present_ones(arms: dict[str, TrainConfig | None]) -> None:
    student, judge = (miniature.digest_weights(Path(model)) for model in (miniature.STUDENT, miniature.JUDGE))
    cases = [("rubrics", False), ("rubrics", True), ("own teacher", False)]
    digests = {miniature.digest_arm(student, judge, arms[arm], shared=shared) for arm, shared in cases}
    recorded = {outcome.made_from for outcome in miniature.read_outcomes()}
    assert digests <= recorded


@pytest.mark.slow
def test_no_caption_is_found_whose_reward_rises_while_it_gets_worse() -> None:
    """The short form of `python -m benchmarks.adversary`."""
    tried, found = adversary.search(list_scenes(12), writer="statements", candidates=120)
    assert set(tried) == set(adversary.CHANGES) and tried.total() > 1000
    assert found and not [one for one in found if one.lost_f1 > adversary.MOST_LOST and not one.is_misled]


def test_the_adversary_finds_how_sets_of_claims_are_gamed() -> None:
    _, found = adversary.search(list_scenes(3), writer="claims", candidates=120)
    assert [one for one in found if one.lost_f1 > adversary.MOST_LOST and not one.is_misled]
