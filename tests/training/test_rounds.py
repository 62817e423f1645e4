"""Further rounds: one command captions, writes rubrics and trains again from the model of the round before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.execution import whole_run
from pipeline.execution.run_state import RunState
from pipeline.records import Caption
from pipeline.sections import stamped
from pipeline.storage import tables
from stages import train
from stages.training.provenance import digest_weights
from stages.training.settings import Config
from tests.support.runs import begin, make, recap
from tests.support.training_runs import make_grpo_sections

SHORT = {"steps": 2, "save_steps": 1, "eval_images": 0, "learning_rate": 1e-3, "max_tokens": 64}
REWARDS = {"committee": 1.0, "form": 1.0}  # form differs between answers, whatever they claim


def make_sections(*, rounds: int, **changes: Any) -> dict[str, dict[str, Any]]:
    """A training whose student is an engine of the run."""
    sections = make_grpo_sections(**SHORT, rewards=REWARDS, rounds=rounds, captions=["student"], **changes)
    sections["source"] |= {"num_images": 6}
    sections["engines.student"] = {"kind": "transformers", "model": "scenes-captioner"}
    sections["caption.student"] = {"recipe": "scenes", "engine": "student"}
    sections["rubric.committee"] |= {"student": "student", "writer": "statements"}
    return sections


def begin_run(folder: Path, **changes: Any) -> Path:
    begin(folder, make_sections(**changes))
    for stage in ("ingest", "caption", "rubric"):
        assert make(folder, stage).exit_code == 0
    return folder


def read_digest(folder: Path, table: str) -> str:
    footer = tables.read_footer(folder / table / "00000.parquet")
    assert footer is not None
    return footer.digest


def read_weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_second_round_begins_with_the_model_of_the_first_and_keeps_its_own_tables(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run", rounds=2)
    before = read_digest(folder, "caption/student")
    done = recap("run", "train", "--run", folder)
    second = folder / "rounds" / "2"
    assert done.stdout.strip() == str(second / "model")
    assert read_weights(folder / "model") != read_weights(second / "model")
    for table in ("image", "caption/warm", "caption/student", "rubric/committee"):
        ours, first = (run / table / "00000.parquet" for run in (second, folder))
        assert ours.samefile(first) == (table in ("image", "caption/warm")), table
    assert read_digest(folder, "caption/student") == before != read_digest(second, "caption/student")
    models = {row.model for row in tables.read_rows(second / "caption/student/00000.parquet", Caption)}
    assert models == {f"round 1: {digest_weights(str(folder / 'model'))[:12]}"}

    files = {path: path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()}
    assert recap("run", "train", "--run", folder).stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()} == files

    assert recap("verify", "--run", folder).returncode == 0
    assert "rounds" not in recap("status", "--run", folder).stderr

    begin(folder, make_sections(rounds=1))
    assert recap("run", "train", "--run", folder).stdout.strip() == str(folder / "model")


@pytest.mark.slow
def test_a_round_that_was_cut_short_resumes_with_the_same_result(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run", rounds=2)
    whole_run.make_product(train, RunState(config.load(folder)))
    second = folder / "rounds" / "2"
    weights = read_weights(second / "model")
    shutil.rmtree(second / "model")
    shutil.rmtree(second / "train" / "checkpoint-2")
    shutil.rmtree(second / "rubric" / "committee")
    assert whole_run.make_product(train, RunState(config.load(folder))) == second / "model"
    assert read_weights(second / "model") == weights


def test_rounds_that_would_repeat_themselves_are_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", make_sections(rounds=2, model="scenes-student"))
    with pytest.raises(ConfigError, match=r"train.rounds: is 2, but no table .* depends on train.model = .*scenes-stu"):
        train.reads(config.load(folder))
    sections = make_sections(rounds=2)
    keys = {"rounds": 2, "captions": ["hasty"], "model": "scenes-student"}
    begin(folder, {**sections, "train": keys})
    with pytest.raises(ConfigError, match=r"train.rounds: is 2; only a method that learns from its own answers"):
        train.reads(config.load(folder))


def test_the_number_of_rounds_is_no_part_of_the_first_models_fingerprint() -> None:
    assert "rounds" not in stamped(Config(rounds=3))
