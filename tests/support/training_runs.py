"""Runs over scenes that have what `[train]` learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.records import ImageRubric, RubricCriterion
from pipeline.storage import tables
from pipeline.validation import Section
from stages.training.dataset import TrainExample
from stages.training.methods import sft
from stages.training.settings import TrainConfig, read_section

TEACHERS = ("warm", "boxy", "plain", "central")


def make_sft_sections(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run.toml whose captions come from a teacher, and whose statements are labelled."""
    sections: dict[str, dict[str, Any]] = {
        "source": {"kind": "scenes", "num_images": 60, "seed": 7, "shard_size": 30},
        "engines.hasty": {"kind": "stages.scenes.teachers", "teacher": "hasty"},
        "engines.speaker": {"kind": "stages.scenes.teachers", "teacher": "speaker"},
        "engines.labeller": {"kind": "stages.scenes.teachers", "teacher": "labeller"},
        "caption.main": {"recipe": "scenes", "engine": "hasty"},
        "caption.statements": {"recipe": "scenes", "engine": "speaker", "num_candidates": 3, "temperature": 1.0},
        "score.labels": {"kind": "judge", "engine": "labeller", "rubric": "scenes", "captions": ["statements"]},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "eval_images": 6,
            "save_steps": 2,
            "eval_steps": 3,
            "log_steps": 1,
            "optimizer": "masters",
            "learning_rate": 1e-3,
            "num_workers": 0,
        },
    }
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    return sections


def make_grpo_sections(**changes: Any) -> dict[str, dict[str, Any]]:
    """A run.toml that trains the shipped captioner on a committee's rubrics; `changes` go to `[train]`."""
    return {
        "source": {"kind": "scenes", "num_images": 16, "seed": 7, "broken_share": 0.0, "duplicate_share": 0.0},
        **{f"engines.{name}": {"kind": "stages.scenes.teachers", "teacher": name} for name in ("hasty", *TEACHERS)},
        **{f"caption.{name}": {"recipe": "scenes", "engine": name} for name in ("hasty", *TEACHERS)},
        "rubric.committee": {"teachers": list(TEACHERS), "student": "hasty"},
        "score.committee": {"kind": "rubric", "rubric": "committee", "captions": ["hasty"]},
        "score.form": {"kind": "tests.support.letters", "captions": ["hasty"]},
        "train": {
            "method": "grpo",
            "model": "scenes-captioner",
            "captions": ["hasty"],
            "rewards": {"committee": 1.0},
            "group_size": 2,
            "batch_size": 4,
            "steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "optimizer": "masters",
            "max_tokens": 40,
            "eval_images": 2,
            "eval_steps": 4,
            "save_steps": 2,
            "log_steps": 1,
            **changes,
        },
    }


def read_train_section(**keys: Any) -> TrainConfig:
    return read_section(Section(keys, file=Path("run.toml"), field="train"))


def read_sft_examples(folder: Path, **keys: Any) -> list[TrainExample]:
    """What `[train]` with these keys would learn from the run's tables."""
    return list(sft.open(config.load(folder), read_train_section(**keys)).read_examples())


def write_rubrics(path: Path, criteria: dict[str, tuple[RubricCriterion, ...]]) -> None:
    """A table of rubrics with these criteria by key."""
    common: dict[str, Any] = {"name": "r", "error": None, "num_teachers": 1, "writer": "claims"}
    rows = (
        ImageRubric(key=key, status="ok" if some else "empty", criteria=some, **common)
        for key, some in criteria.items()
    )
    provenance = tables.Provenance(stage="rubric", name="r", version=1, slice={}, inputs={})
    tables.write_rows(path, ImageRubric, rows, provenance)
