"""Trains the vision tower alone: it learns what each image token of a labelled scene shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines import Engine
from pipeline.sections import Run
from stages.training import supervised
from stages.training.dataset import TrainExample, make_example, read_images
from stages.training.settings import TrainConfig
from stages.training.trainer import TrainingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """It has no keys of its own."""


def check_config(config: TrainConfig) -> None:
    if config.lora:
        raise ValueError('lora needs method = "sft" or "grpo"')


def open(run: Run, _: TrainConfig) -> Regions:
    return Regions(run)


class Regions:
    """The method `regions`."""

    generates, answers_per_example, learns_regions = False, 1, True

    def __init__(self, run: Run) -> None:
        self._run = run

    def list_tables(self) -> Sequence[str]:
        return ["image"]

    def slice(self) -> Mapping[str, Any]:
        return {"asks": {}}

    def read_examples(self) -> Iterator[TrainExample]:
        for _, images in read_images(self._run):
            yield from (make_example(image, ()) for image in images)

    def make_trainer(self, task: TrainingTask, _: Mapping[str, Engine]) -> Any:
        def compute_loss(trainer: Any, _: Any, inputs: dict[str, Any], __: Any) -> Any:
            regions, pixels = inputs.pop("regions"), inputs["pixel_values"].to(trainer.model.dtype)
            trainer.model.model.visual(pixels, grid_thw=inputs["image_grid_thw"])
            return trainer.model.region_reader.loss(regions)

        return supervised.make_trainer(task, add_region_head=True, compute_loss=compute_loss)

    def describe(self) -> str:
        return "on the labels of image tokens"
