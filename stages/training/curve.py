"""The records of a training beside the model: its learning curve as a table, and the model's card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import Step
from pipeline.sections import Run, stamped
from pipeline.storage import tables
from stages.training.settings import TrainConfig

# Speed, and how answers were sampled, are not part of what was learnt.
DROPPED = re.compile(r"clip_ratio|completions/m|num_tokens|step_time|total_flos|runtime|_per_second")
CARD = "README.md"  # in the model's folder


class Curve:
    """The table `step/00000.parquet`, rewritten at each checkpoint with all points so far.

    Its footer records what the checkpoints beside it were trained from.
    """

    def __init__(self, folder: Path, provenance: tables.Provenance) -> None:
        self._path, self._provenance = self.path(folder), provenance

    @staticmethod
    def path(folder: Path) -> Path:
        return folder / "step" / "00000.parquet"

    def create(self) -> None:
        """Writes an empty table unless there is one, so that no checkpoint is ever without its footer."""
        if not self._path.exists():
            self.write([])

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        tables.write_rows(self._path, Step, list_points(log), self._provenance)


def list_points(log: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The trainer's log as points, in order, each once, without missing values."""
    points = {
        (int(entry["step"]), name): float(value)
        for entry in log
        for name, value in entry.items()
        if name not in ("step", "epoch") and value is not None and not DROPPED.search(name)
    }
    return [Step(step=step, name=name, value=value) for (step, name), value in sorted(points.items())]


def render_card(
    run: Run,
    config: TrainConfig,
    log: Sequence[Mapping[str, Any]],
    *,
    description: str,
    generates: bool,
    num_images: int,
) -> str:
    """The model's README.md: what it was trained on, how, and how far it got.

    Args:
        description: of what it learnt from, by the method.
        generates: whether the method generates answers; its evaluation loss then means nothing.
    """
    last = {name: value for entry in log for name, value in entry.items() if name.startswith("eval_")}
    figures = "".join(
        f"| {name.removeprefix('eval_').replace('_', ' ')} | {last[name]:.4g} |\n"
        for name in ("eval_loss", "eval_mean_token_accuracy", "eval_regions_loss", "eval_reward", "eval_words")
        if name in last and not (generates and name == "eval_loss")
    )
    settings = {**stamped(config), **stamped(config.options.config)}
    return TEMPLATE.format(
        name=config.output,
        description=description,
        source=run.source.kind,
        num_images=num_images,
        num_examples=config.steps * config.accumulate * config.batch_size,
        figures=figures,
        settings="".join(f"| {name} | `{value}` |\n" for name, value in settings.items()),
        folder=run.folder.name,
    )


TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# {name}

Trained {description}, over a corpus of kind `{source}`: {num_examples} examples of {num_images} images, in an order
that follows from the seed.

| on held-out images | |
|---|---|
{figures}
| `[train]` | |
|---|---|
{settings}
To train it again: `recap run train --run {folder}`, after the passes that it learns from.
"""
