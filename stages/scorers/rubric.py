"""Scorer `rubric`: the weighted share of the criteria of an image's own rubric that a caption meets.

The value sum(w * y) / sum(w) and the weights are RubiCap's (arXiv 2603.09160). A criterion is decided by the claims of
the caption, or by a judge that sees the caption alone. There is no value for an image whose rubric is missing or empty,
or when the judge fails.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from stages.scorers import Sample, ScoreResult, combine_criteria, judge
from stages.text.given import OpenFields
from stages.text.prompts import map_where

VERSION = 4
DEFAULT_SPEC = "text_only"


@dataclass(frozen=True, kw_only=True)
class Config(judge.VerdictConfig):
    rubric: str = key(help="the pass that wrote the criteria: a name in [rubric]")
    judge: str = key("", "the model that decides them: a name in [engines]; empty: the claims of the caption do")
    words: str = key("", "the judge's prompt: a file of rubrics/ without criteria, your own or one that ships")


@dataclass(frozen=True, kw_only=True)
class Settings:
    rubric: str
    judge: str = key("", "a name in [engines]", stamp=False)
    spec: RubricSpec | None = key(None, "the judge's prompt; None without a judge", stamp="words")
    is_soft: bool = key(False, "values are means by probability", stamp_default=False)
    with_reasons: bool = key(True, "the judge writes reasons", stamp_default=False)


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: the judge's prompt does not exist, is wrong, or there is no judge to use it.
    """
    if not config.judge:
        if config.words:
            raise ConfigError(f"{field}.words", "is used by a judge only; set judge too")
        if config.verdict != "written" or not config.reasons:
            name = "verdict" if config.verdict != "written" else "reasons"
            raise ConfigError(f"{field}.{name}", "is used by a judge only; set judge too")
        return Settings(rubric=config.rubric)
    try:
        spec = rubrics.load_judge_spec(config.words or DEFAULT_SPEC, run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.words", str(error)) from error
    return Settings(
        rubric=config.rubric,
        judge=config.judge,
        spec=spec,
        is_soft=config.verdict == "logprob",
        with_reasons=config.reasons,
    )


def engines(settings: Settings) -> Mapping[str, str]:
    return {"judge": settings.judge} if settings.judge else {}


def rubric(settings: Settings) -> str:
    return settings.rubric


def open_fields(settings: Settings) -> OpenFields:
    return settings.spec.open_fields if settings.spec else OpenFields(prompt="no judge")


def unasked(settings: Settings) -> Collection[str]:
    return settings.spec.unasked if settings.spec else rubrics.UNASKED


def score(samples: Iterable[Sample], settings: Settings, engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    score_samples = partial(_judge_samples, settings=settings, engines=engines) if settings.spec else _check_samples
    for sample, result in map_where(score_samples, samples, lambda sample: bool(sample.rubric_criteria)):
        if result is None:
            missing = "has no rubric" if sample.rubric_criteria is None else "has an empty rubric"
            result = ScoreResult(value=None, status="unknown", error=f"this image {missing}")
        yield result


def _judge_samples(
    samples: Iterable[Sample], settings: Settings, engines: Mapping[str, Engine]
) -> Iterator[ScoreResult]:
    assert settings.spec is not None
    spec = settings.spec
    build = partial(rubrics.build_image_rubric, spec, with_reasons=settings.with_reasons)
    pairs = ((sample, build(sample.rubric_criteria or ())) for sample in samples)
    return judge.score_by_rubrics(pairs, engine=settings.judge, engines=engines, is_soft=settings.is_soft)


def _check_samples(samples: Iterable[Sample]) -> Iterator[ScoreResult]:
    for sample in samples:
        claims = claim_checks.collect_rewarded_claims(sample.text)
        criteria = [_check_criterion(criterion, claims) for criterion in sample.rubric_criteria or ()]
        for number, criterion in enumerate(sample.rubric_criteria or ()):
            check = None if criterion.claim is None else claim_checks.parse_check(criterion.claim)
            if check is not None and check.how == "beyond":
                criteria = _charge(criteria, number, check.cost(claims))
        yield combine_criteria(criteria, undecided="only a judge can decide these criteria")


def _charge(criteria: Sequence[Criterion], number: int, cost: float) -> list[Criterion]:
    """The criteria after a caption has paid for what it says beyond, which the criterion of this number forbids."""
    beyond = criteria[number]
    met = math.fsum(c.weight * (c.value or 0.0) for c in criteria if c is not beyond)
    of_allowance, of_met = claim_checks.discount(met, cost, beyond.weight)
    return [replace(c, value=of_allowance if c is beyond else c.value and c.value * of_met) for c in criteria]


def _check_criterion(criterion: RubricCriterion, claims: CaptionClaims) -> Criterion:
    is_met = None if criterion.claim is None else claim_checks.parse_check(criterion.claim).is_met(claims)
    return Criterion(
        id=criterion.id,
        verdict=None if is_met is None else "yes" if is_met else "no",
        value=None if is_met is None else float(is_met),
        weight=criterion.weight,
        reason=criterion.text,
    )
