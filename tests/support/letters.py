"""Decides what a text is worth by its letters alone: a scorer of one's own, for tests, that tells texts apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.engines import Engine
from stages.scorers import Sample, ScoreResult


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing."""


def score(samples: Iterable[Sample], _: Config, __: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    for sample in samples:
        yield ScoreResult(value=sum(char.isalpha() for char in sample.text) / max(1, len(sample.text)))
