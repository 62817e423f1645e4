"""Decides what a scorer is: one module of this folder, from samples to as many marks, in order, lazily.

A scorer has

- `Config`: its keys in `[score.NAME]`;
- `score(samples, config, engines) -> Iterator[Mark]`;

and where it needs them

- `prepare(config, *, run, field) -> config`: reads the words that its keys name; what it returns goes to `score`, and
  `pipeline.config.stamped` of it into the fingerprint;
- `engines(config) -> Mapping[str, str]`: of the keys that name engines, the names in `[engines]` that it asks;
- `rubric(config) -> str`: the name in `[rubric]` whose criteria its samples are to carry;
- `VERSION`: an integer, raised when equal samples get other marks.

It knows no tables, for a filter and a reward call it alike: what we filter on is what we train on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.engines import Engine
from pipeline.records import Criterion, RubricCriterion, ScoreStatus
from pipeline.sections import Plugin, Run, stamped
from stages.text.prompts import engine_slice


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One caption to be marked."""

    key: str
    candidate: int
    text: str
    alt_text: str | None = None
    source_key: str = ""  # what the corpus calls the image
    data: Callable[[], bytes]  # the image file, read when it is called; called only by scorers that look at it
    seed: int = 0
    rubric_criteria: tuple[RubricCriterion, ...] | None = None  # of its image's own rubric; None where there is none

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What a scorer says of one sample: a value exactly when its status is "ok"."""

    value: float | None  # [0, 1]; None is "cannot say", never 0
    criteria: tuple[Criterion, ...] = ()
    status: ScoreStatus = "ok"
    error: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0  # the highest of its answers; 0 where nobody was asked
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status == "ok"), f"{self.status} with the value {self.value}"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A scorer and its config, ready."""

    kind: str
    module: ModuleType
    config: Any
    engine_names: Mapping[str, str]  # key -> the engine that it names
    rubric: str = ""  # the rubric pass whose criteria its samples carry; "": none

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(self.engine_names.values())

    def slice(self, run: Run, *, field: str) -> dict[str, Any]:
        """All that decides its marks. The seed does only where a model is asked.

        Raises:
            ConfigError: an engine that it asks is not there; `field` is the section that names it.
        """
        found = {"kind": self.kind, "version": getattr(self.module, "VERSION", 1), **stamped(self.config)}
        if not self.engine_names:
            return found
        asked = [engine_slice(run, engine, field=f"{field}.{key}") for key, engine in self.engine_names.items()]
        return {**found, "seed": run.seed, "engines": asked}

    def score(self, samples: Iterable[Sample], engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
        marks: Iterator[ScoreResult] = self.module.score(samples, self.config, engines)
        return marks


def load_scorer(plugin: Plugin, *, run: Path | None, field: str) -> Scorer:
    """The scorer of a section.

    Args:
        plugin: its kind and config.
        run: the folder whose own rubrics come before those that ship.
        field: the section's place, for messages.

    Raises:
        ConfigError: something that the section names is missing or wrong.
    """
    module, config = plugin.module, plugin.config
    if hasattr(module, "prepare"):
        config = module.prepare(config, run=run, field=field)
    asks = module.engines(config) if hasattr(module, "engines") else {}
    rubric = module.rubric(config) if hasattr(module, "rubric") else ""
    return Scorer(kind=plugin.kind, module=module, config=config, engine_names=asks, rubric=rubric)


def weighted_mean(criteria: Iterable[Criterion]) -> float | None:
    """sum(w * v) / sum(w) over the criteria that have a value; None when none has. Their order does not matter."""
    decided = [(c.weight, c.value) for c in criteria if c.value is not None]
    total = math.fsum(weight for weight, _ in decided)
    return math.fsum(weight * value for weight, value in decided) / total if total else None
