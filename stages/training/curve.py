"""Decides what is kept of a training beside the model: its learning curve as a table, and the model's card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import Step
from pipeline.sections import Run, stamped
from pipeline.storage import tables
from stages.training.settings import Config

# how fast it was, and how answers were drawn, is no part of what was learnt
DROPPED = re.compile(r"clip_ratio|completions/m|num_tokens|step_time|total_flos|runtime|_per_second")


class Curve:
    """Writes `step/00000.parquet` anew at each checkpoint: all points so far, those from before a kill included.

    Its stamp tells what the checkpoints beside it were trained from.
    """

    def __init__(self, folder: Path, recipe: tables.Provenance) -> None:
        self._path, self._recipe = self.path(folder), recipe

    @staticmethod
    def path(folder: Path) -> Path:
        return folder / "step" / "00000.parquet"

    def begin(self) -> None:
        """Before the first step, so that no checkpoint is ever without its stamp."""
        if not self._path.exists():
            self.write([])

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        tables.write_rows(self._path, Step, points(log), self._recipe)


def points(log: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The trainer's log as points, in order, each once; what it could not measure is left out."""
    found = {
        (int(entry["step"]), name): float(value)
        for entry in log
        for name, value in entry.items()
        if name not in ("step", "epoch") and value is not None and not DROPPED.search(name)
    }
    return [Step(step=step, name=name, value=value) for (step, name), value in sorted(found.items())]


def card(run: Run, config: Config, log: Sequence[Mapping[str, Any]], *, num_images: int) -> str:
    """The model's README.md: what it learnt from, how, and how far it got."""
    last = {name: value for entry in log for name, value in entry.items() if name.startswith("eval_")}
    if config.method == "grpo":
        last.pop("eval_loss", None)  # one answer to an image has none to be compared with
    figures = "".join(
        f"| {name.removeprefix('eval_').replace('_', ' ')} | {last[name]:.4g} |\n"
        for name in ("eval_loss", "eval_mean_token_accuracy", "eval_regions_loss", "eval_reward", "eval_words")
        if name in last
    )
    settings = "".join(f"| {name} | `{value}` |\n" for name, value in stamped(config).items())
    return CARD.format(
        name=config.output,
        learnt=_learnt(config),
        source=run.source.kind,
        num_images=num_images,
        samples=config.steps * config.accumulate * config.batch_size,
        figures=figures,
        settings=settings,
        folder=run.folder.name,
    )


def _learnt(config: Config) -> str:
    if config.method == "regions":
        return "what lies under each image token"
    captions = ", ".join(config.captions)
    if config.method == "grpo":
        return (
            f"by GRPO from the scores {', '.join(config.rewards)} of its own answers, asked as the pass {captions} was"
        )
    return f"the verdicts {config.scores} on the passes {captions}" if config.scores else f"the texts of {captions}"


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# {name}

Learnt {learnt}, over a corpus of kind `{source}`: {num_images} images and {samples} lessons drawn in all, an epoch
after the other, in an order that follows from the seed.

| on held-out images | |
|---|---|
{figures}
| `[train]` | |
|---|---|
{settings}
To make it again: `recap run train --run {folder}`, after the passes it learns from.
"""
