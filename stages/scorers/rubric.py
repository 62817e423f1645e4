"""Decides what a caption is worth by its image's own rubric: the weighted share of the criteria that it meets.

The value sum(w * y) / sum(w), and the weights, are RubiCap's (arXiv 2603.09160). Whether a criterion is met is decided
by the claims that the caption makes, or by a judge who sees the caption alone. An image without a rubric, or with an
empty one, gives no value, and a judge that fails gives none either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Criterion, RubricCriterion
from pipeline.sections import key
from stages import rubrics
from stages.rubrics import RubricSpec
from stages.scenes import claim_checks
from stages.scenes.claim_checks import CaptionClaims
from stages.scorers import Sample, ScoreResult, judge, weighted_mean
from stages.text.prompts import map_where

VERSION = 4
WORDS = "text_only"  # what a judge is asked where the section does not say


@dataclass(frozen=True, kw_only=True)
class Config:
    rubric: str = key(help="where the criteria come from: a name in [rubric]")
    judge: str = key("", "who decides them: a name in [engines]; empty: nobody, the claims that a caption makes do")
    words: str = key("", "what the judge is asked: a file of rubrics/ without criteria, your own or one that ships")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the criteria come from, and who decides them."""

    rubric: str
    judge: str = key("", "a name in [engines]", stamp=False)
    words: RubricSpec | None = None  # None: nobody is asked


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: there are no such words, they are wrong, or there is nobody whom they could ask.
    """
    if not config.judge:
        if config.words:
            raise ConfigError(f"{field}.words", "asks nobody: name a judge too")
        return Settings(rubric=config.rubric)
    try:
        words = rubrics.load_judge_spec(config.words or WORDS, run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.words", str(error)) from error
    return Settings(rubric=config.rubric, judge=config.judge, words=words)


def engines(config: Settings) -> Mapping[str, str]:
    return {"judge": config.judge} if config.judge else {}


def rubric(config: Settings) -> str:
    return config.rubric


def score(samples: Iterable[Sample], config: Settings, engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    mark = partial(_judged, config=config, engines=engines) if config.judge else _matched_all
    for sample, made in map_where(mark, samples, lambda sample: bool(sample.rubric_criteria)):
        yield made or _without(sample)


def _without(sample: Sample) -> ScoreResult:
    why = "has no rubric" if sample.rubric_criteria is None else "has an empty rubric"
    return ScoreResult(value=None, status="unknown", error=f"this image {why}")


def _judged(samples: Iterable[Sample], config: Settings, engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    assert config.words is not None
    words = config.words
    own = ((sample, rubrics.build_image_rubric(words, sample.rubric_criteria or ())) for sample in samples)
    return judge.score_by_rubrics(own, engine=config.judge, engines=engines)


def _matched_all(samples: Iterable[Sample]) -> Iterator[ScoreResult]:
    for sample in samples:
        yield _matched(sample.text, sample.rubric_criteria or ())


def _matched(text: str, demands: Iterable[RubricCriterion]) -> ScoreResult:
    """By the claims that the caption makes."""
    caption = claim_checks.collect_rewarded_claims(text)
    criteria = tuple(_criterion(demand, caption) for demand in demands)
    value = weighted_mean(criteria)
    if value is None:
        return ScoreResult(
            value=None, criteria=criteria, status="unknown", error="only a judge can decide these criteria"
        )
    return ScoreResult(value=value, criteria=criteria)


def _criterion(demand: RubricCriterion, caption: CaptionClaims) -> Criterion:
    is_met = None if demand.claim is None else claim_checks.parse_check(demand.claim).is_met(caption)
    return Criterion(
        id=demand.id,
        verdict=None if is_met is None else "yes" if is_met else "no",
        value=None if is_met is None else float(is_met),
        weight=demand.weight,
        reason=demand.text,
    )
