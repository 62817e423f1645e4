"""A user-defined scorer, `kind = "tests.support.letters"`: the share of letters in a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.engines import Engine
from stages.scorers import Sample, ScoreResult


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


def score(samples: Iterable[Sample], _: Config, __: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    for sample in samples:
        yield ScoreResult(value=sum(char.isalpha() for char in sample.text) / max(1, len(sample.text)))
