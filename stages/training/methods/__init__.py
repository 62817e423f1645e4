"""Training methods, one module each; the folder is the registry.

A method's module has

- `Config`: its own keys in `[train]`;
- `open(run, config) -> Method`: raises ConfigError where a key names something that does not exist;
- optionally `check_config(config)`: raises ValueError where its keys do not fit the common ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pipeline.engines import Engine
from stages.training.dataset import TrainExample
from stages.training.trainer import TrainingTask


class Method(Protocol):
    """A training method, opened for one run."""

    generates: bool  # whether the model learns from answers that it generates itself
    answers_per_example: int  # in a batch
    learns_regions: bool  # whether batches carry the labels of image tokens

    def list_tables(self) -> Sequence[str]:
        """The folders of the tables that it reads."""

    def slice(self) -> Mapping[str, Any]:
        """All that decides the model besides the keys of `[train]`, as JSON values."""

    def read_examples(self) -> Iterator[TrainExample]:
        """In key order."""

    def make_trainer(self, task: TrainingTask, engines: Mapping[str, Engine]) -> Any:
        """A trainer of transformers for examples that are already in order."""

    def describe(self) -> str:
        """The source that the model learns from, as the end of a sentence that begins with "Trained"."""
