"""Scorers: modules that rate captions, one per file, named by `kind` in `[score.NAME]`.

The folder is the registry. A kind with a dot is a module of your own. A scorer module has

- `Config`: a frozen dataclass of its keys in `[score.NAME]`, declared with `pipeline.sections.key`;
- `score(samples, settings, engines) -> Iterator[ScoreResult]`: one result per sample, in order, lazily;

and where needed

- `prepare(config, *, run, field) -> settings`: loads the files that the keys name and checks the keys. Its result is
  passed to `score` in place of the config, and `pipeline.sections.stamped` of it goes into the fingerprint;
- `engines(settings) -> Mapping[str, str]`: for each key that names an engine, the name in `[engines]`;
- `shows_images(settings) -> bool`: whether its engines see the images;
- `unasked(settings) -> Collection[str]`: the kinds of planted errors (`[canary]`) that it is not meant to notice; by
  default, a sentence that is missing or repeated;
- `open_fields(settings) -> OpenFields`: the fields of its prompt that `given` of the section fills; by default none;
- `rubric(settings) -> str`: the `[rubric]` pass whose criteria the samples carry;
- `VERSION`: an integer, raised when equal samples get different results.

A scorer knows no tables: the score stage and the training reward call the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.engines import Engine
from pipeline.records import Criterion, RubricCriterion, ScoreStatus
from pipeline.sections import Plugin
from stages.rubrics import UNASKED
from stages.text.given import OpenFields, Texts
from stages.text.loaded import LoadedPlugin, prepare_plugin


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One caption to score."""

    key: str
    candidate: int
    text: str
    alt_text: str | None = None
    source_key: str = ""  # the image's name in the corpus
    data: Callable[[], bytes]  # reads the image file; only scorers that look at the image call it
    seed: int = 0
    texts: Texts = field(default_factory=dict)  # about the image, by field of the prompt: what `given` has
    rubric_criteria: tuple[RubricCriterion, ...] | None = None  # of the image's own rubric; None: it has none

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """The score of one sample. It has a value exactly when its status is "ok"."""

    value: float | None  # [0, 1]; None when the scorer cannot decide, never 0
    criteria: tuple[Criterion, ...] = ()
    status: ScoreStatus = "ok"
    error: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0  # the highest attempt of its answers; 0 when no model was used
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status == "ok"), f"{self.status} with the value {self.value}"


@dataclass(frozen=True, kw_only=True)
class Scorer(LoadedPlugin):
    """A loaded scorer with its settings."""

    open_fields: OpenFields  # of its prompt: those that `given` fills
    rubric: str = ""  # the rubric pass whose criteria its samples carry; "": none
    shows_images: bool = False
    unasked: Collection[str] = UNASKED  # kinds of planted errors that it is not meant to notice

    def score(self, samples: Iterable[Sample], engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
        results: Iterator[ScoreResult] = self.module.score(samples, self.settings, engines)
        return results


def load_scorer(plugin: Plugin, *, run: Path | None, field: str) -> Scorer:
    """Loads the scorer of a section.

    Args:
        plugin: its kind and config.
        run: the folder whose rubrics and flags override those that ship.
        field: the section, for messages.

    Raises:
        ConfigError: something that the section names is missing or wrong.
    """
    loaded = prepare_plugin(plugin, run=run, field=field)
    module, settings = loaded.module, loaded.settings
    return Scorer(
        **vars(loaded),
        rubric=module.rubric(settings) if hasattr(module, "rubric") else "",
        open_fields=module.open_fields(settings) if hasattr(module, "open_fields") else OpenFields(),
        shows_images=module.shows_images(settings) if hasattr(module, "shows_images") else False,
        unasked=module.unasked(settings) if hasattr(module, "unasked") else UNASKED,
    )


def weighted_mean(criteria: Iterable[Criterion]) -> float | None:
    """sum(w * v) / sum(w) over the criteria that have a value; None if none has. Independent of their order."""
    decided = [(c.weight, c.value) for c in criteria if c.value is not None]
    total = math.fsum(weight for weight, _ in decided)
    return math.fsum(weight * value for weight, value in decided) / total if total else None


def combine_criteria(criteria: Iterable[Criterion], *, undecided: str) -> ScoreResult:
    """The weighted mean of criteria as a result; if no criterion has a value, "unknown" with the error `undecided`."""
    criteria = tuple(criteria)
    value = weighted_mean(criteria)
    if value is None:
        return ScoreResult(value=None, criteria=criteria, status="unknown", error=undecided)
    return ScoreResult(value=value, criteria=criteria)
