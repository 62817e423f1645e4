"""The arms of benchmarks/miniature are valid, recorded ones are not trained again, and the adversary finds nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks import adversary, details, miniature
from benchmarks.held_out import list_scenes
from benchmarks.worlds import CHOICE
from pipeline import config
from stages.scenes.claims import list_facts, write_caption
from stages.training.settings import TrainConfig
from tests.support.runs import ROOT


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, TrainConfig | None]:
    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    return dict(miniature.make_arms(config.load(tmp_path).sections["train"][""]))


def test_every_arm_learns_from_the_same_number_of_samples(arms: dict[str, TrainConfig | None]) -> None:
    num_samples = {arm: miniature.count_samples(one) for arm, one in arms.items() if one is not None}
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


def test_details_have_every_scene_once_with_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    captions = [write_caption(list_facts(scene), Random(0)) for scene in list_scenes(60)]
    captions[0] += " " + captions[0].split(". ")[0] + "."
    details.print_details("truth", captions, world=CHOICE)
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header == f"truth, world {CHOICE}"
    counts = [int(row[14:21]) for row in rows[:5]]
    assert counts[0] == 60 == sum(counts[1:])
    assert "0.017 (0.000-0.050)" in rows[0] and "1.000 (1.000-1.000)" in rows[0]
    assert rows[-1].split() == ["recall", *["1.000"] * 6]
    low, high = details.bootstrap_ratio(np.array([0.0, 1.0] * 200), np.ones(400))
    assert 0.43 < low < 0.47 and 0.53 < high < 0.57
