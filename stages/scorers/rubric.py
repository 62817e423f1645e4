"""Decides what a caption is worth by its image's own rubric: the weighted share of the criteria that it meets.

The value sum(w * y) / sum(w), and the weights, are RubiCap's (arXiv 2603.09160). An image without a rubric, or with an
empty one, gives no value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.config import key
from pipeline.engine import Engine
from pipeline.records import Criterion, Demand
from stages import matching
from stages.matching import Heard
from stages.scorers import Mark, Sample, weighted_mean

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    rubric: str = key(help="where the criteria come from: a name in [rubric]")


def rubric(config: Config) -> str:
    return config.rubric


def score(samples: Iterable[Sample], _: Config, __: Mapping[str, Engine]) -> Iterator[Mark]:
    for sample in samples:
        if sample.asked:
            yield _matched(sample.text, sample.asked)
        else:
            why = "has no rubric" if sample.asked is None else "has an empty rubric"
            yield Mark(value=None, status="unknown", error=f"this image {why}")


def _matched(text: str, demands: Iterable[Demand]) -> Mark:
    """By the claims that the caption makes."""
    caption = matching.heard(text)
    criteria = tuple(_criterion(demand, caption) for demand in demands)
    value = weighted_mean(criteria)
    if value is None:
        return Mark(value=None, criteria=criteria, status="unknown", error="only a judge can decide these criteria")
    return Mark(value=value, criteria=criteria)


def _criterion(demand: Demand, caption: Heard) -> Criterion:
    is_met = None if demand.claim is None else matching.read(demand.claim).is_met(caption)
    return Criterion(
        id=demand.id,
        verdict=None if is_met is None else "yes" if is_met else "no",
        value=None if is_met is None else float(is_met),
        weight=demand.weight,
        reason=demand.text,
    )
