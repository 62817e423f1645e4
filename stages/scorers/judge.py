"""Scorer `judge`: a model answers the questions of a rubric about a caption.

One request asks all questions about a caption, or about one sentence of it. Image and rubric come first and the caption
last, so that requests about one image share a prefix. An invalid verdict is the judge's failure, not the caption's: it
is retried, and if that fails, nothing is decided.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.engines import MAX_TOP_TOKENS, Engine, Reply, Request
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Criterion, ScoreStatus
from pipeline.sections import key
from pipeline.storage.sentences import split_sentences
from stages import rubrics
from stages.rubrics import Question, Rubric
from stages.scorers import Sample, ScoreResult, weighted_mean
from stages.text.answers import read_value
from stages.text.given import OpenFields
from stages.text.prompts import derive_seed, map_with_context
from stages.text.verdicts import read_probabilities

VERSION = 1
NO_PROBABILITIES = 'verdict = "logprob" needs the log-probabilities of tokens, which the engine did not return'


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """The keys of a scorer that asks a model for verdicts."""

    verdict: Literal["written", "logprob"] = key(
        "written",
        "the value of an answer: that of the verdict written, or the mean over all verdicts by their probabilities",
        stamp_default=False,
    )
    reasons: bool = key(True, "have the judge write a reason before each verdict", stamp_default=False)


@dataclass(frozen=True, kw_only=True)
class Config(VerdictConfig):
    engine: str = key(help="the judge: a name in [engines]")
    rubric: str = key("dense", "its questions: a file of rubrics/, your own or one that ships")


@dataclass(frozen=True, kw_only=True)
class Settings:
    engine: str = key(help="a name in [engines]", stamp=False)
    rubric: Rubric
    is_soft: bool = key(False, "values are means by probability", stamp_default=False)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """The subject of one request: a caption, or a sentence of it."""

    sample: Sample
    rubric: Rubric
    images: tuple[bytes, ...]
    text: str
    before: str  # the sentences of the caption that precede it
    suffix: str  # of its criteria's ids: "/1" for the first sentence; "" for a caption
    is_last: bool  # of its sample


@dataclass(frozen=True, kw_only=True)
class JudgeAnswer:
    """The parsed reply to one request."""

    criteria: tuple[Criterion, ...]
    reply: Reply
    problem: str  # why it is invalid; "": it is valid


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: the rubric does not exist or is wrong.
    """
    try:
        rubric = rubrics.load(config.rubric, run=run, with_reasons=config.reasons)
        return Settings(engine=config.engine, rubric=rubric, is_soft=config.verdict == "logprob")
    except UnknownNameError as error:
        raise ConfigError(f"{field}.rubric", str(error)) from error


def engines(settings: Settings) -> Mapping[str, str]:
    return {"engine": settings.engine}


def shows_images(settings: Settings) -> bool:
    return settings.rubric.spec.with_image


def open_fields(settings: Settings) -> OpenFields:
    return settings.rubric.spec.open_fields


def unasked(settings: Settings) -> Collection[str]:
    return settings.rubric.spec.unasked


def score(samples: Iterable[Sample], settings: Settings, engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    pairs = ((sample, settings.rubric) for sample in samples)
    return score_by_rubrics(pairs, engine=settings.engine, engines=engines, is_soft=settings.is_soft)


def score_by_rubrics(
    pairs: Iterable[tuple[Sample, Rubric]], *, engine: str, engines: Mapping[str, Engine], is_soft: bool = False
) -> Iterator[ScoreResult]:
    """Scores each sample by the rubric beside it. Requests about one sample are adjacent, for prefix caching.

    Args:
        pairs: samples and their rubrics.
        engine: the judge's name in `engines`.
        engines: the open engines by name.
        is_soft: answers have the mean value of all verdicts by their probabilities, not that of the one written.
    """
    model = engines[engine]
    passages = (passage for sample, rubric in pairs for passage in _split_sample(sample, rubric))
    top_tokens = MAX_TOP_TOKENS if is_soft else 0
    requests = ((passage, _build_request(passage, top_tokens=top_tokens)) for passage in passages)
    answers: list[JudgeAnswer] = []
    for passage, reply in map_with_context(model.generate, requests):
        answers.append(_parse_reply(reply, passage, is_soft=is_soft))
        if passage.is_last:
            yield _combine_answers(answers, passage.rubric, name=engine, engine=model)
            answers = []


def _split_sample(sample: Sample, rubric: Rubric) -> Iterator[Passage]:
    images = (sample.data(),) if rubric.spec.with_image else ()
    by_sentence = rubric.spec.unit == "sentence"
    texts = (by_sentence and split_sentences(sample.text)) or [sample.text]  # an empty text is judged too
    numbered = list(enumerate(texts, start=1))
    # A judge guesses where nothing is stated, so that "Yes." or its own question at the end would raise a mean.
    numbered = [(n, text) for n, text in numbered if not (by_sentence and rubric.is_echo(text))] or numbered
    for number, text in numbered:
        suffix = f"/{number}" if by_sentence else ""
        is_last = number == numbered[-1][0]
        before = " ".join(texts[: number - 1])
        yield Passage(
            sample=sample, rubric=rubric, images=images, text=text, before=before, suffix=suffix, is_last=is_last
        )


def _build_request(passage: Passage, *, top_tokens: int) -> Request:
    sample, rubric = passage.sample, passage.rubric
    return Request(
        id=f"{sample.key}/{sample.candidate}{passage.suffix}",
        system=rubric.spec.system,
        prompt=rubric.build_prompt(
            caption=sample.text,
            sentence=passage.text,
            alt_text=sample.alt_text,
            before=passage.before,
            given=sample.texts,
        ),
        images=passage.images,
        source_key=sample.source_key,
        schema=json.dumps(rubric.schema, ensure_ascii=False),
        ladder=rubric.spec.sampling.rungs,
        accept=lambda reply: _read_reply(reply, rubric)[1],
        seed=derive_seed(sample.seed, passage.suffix),
        top_tokens=top_tokens,
    )


def _read_reply(reply: Reply, rubric: Rubric) -> tuple[Any, str]:
    """The value in a reply, and what is wrong with the reply; "" if nothing is."""
    try:
        return read_value(reply, rubric.schema), ""
    except ValueError as error:
        return None, str(error)


def _parse_reply(reply: Reply, passage: Passage, *, is_soft: bool) -> JudgeAnswer:
    rubric = passage.rubric
    value, problem = _read_reply(reply, rubric)
    if not problem and is_soft and reply.tokens is None:
        problem = NO_PROBABILITIES
    verdicts = {} if problem else rubric.verdicts(value)
    soft: Iterable[Mapping[str, float] | None] = [None] * len(rubric.criteria)
    if not problem and is_soft:
        names = list(rubric.allowed_verdicts.values())
        soft = read_probabilities(reply.tokens or (), names, is_bare=rubric.is_bare)
    criteria = tuple(
        _build_criterion(question, verdicts.get(question.id, {}), passage.suffix, probabilities)
        for question, probabilities in zip(rubric.criteria.values(), soft, strict=True)
    )
    return JudgeAnswer(criteria=criteria, reply=reply, problem=problem)


def _build_criterion(
    question: Question, answer: Mapping[str, str], suffix: str, probabilities: Mapping[str, float] | None
) -> Criterion:
    verdict = answer.get("verdict")
    value = None if verdict is None else question.by_answer.get(verdict)
    if value is not None and probabilities is not None:
        decided = math.fsum(probabilities[name] for name in question.by_answer)
        expected = math.fsum(probabilities[name] * worth for name, worth in question.by_answer.items())
        value = min(1.0, expected / decided) if decided else value
    return Criterion(
        id=f"{question.id}{suffix}",
        verdict=None if value is None else verdict,
        value=value,
        weight=question.effective_weight,
        reason=answer.get("reason"),
    )


def _combine_answers(answers: Sequence[JudgeAnswer], rubric: Rubric, *, name: str, engine: Engine) -> ScoreResult:
    error = next((answer.reply.error for answer in answers if answer.reply.error), None)
    value = None if error else _compute_value(answers, rubric)
    status: ScoreStatus = "error" if error else "unknown" if value is None else "ok"
    if status == "unknown":
        error = next((a.problem for a in answers if a.problem), "the judge decided too few criteria")
    return ScoreResult(
        value=value,
        criteria=tuple(criterion for answer in answers for criterion in answer.criteria),
        status=status,
        error=error,
        num_prompt_tokens=_add_known([answer.reply.num_prompt_tokens for answer in answers]),
        num_output_tokens=_add_known([answer.reply.num_output_tokens for answer in answers]),
        attempt=max(answer.reply.attempt for answer in answers),
        model=engine.model,
        revision=engine.revision,
        engine=name,
    )


def _compute_value(answers: Sequence[JudgeAnswer], rubric: Rubric) -> float | None:
    """The mean over the decided criteria, of all sentences, the worst one, or each as a factor; None if too little was
    decided."""
    criteria = [criterion for answer in answers for criterion in answer.criteria]
    total = math.fsum(criterion.weight for criterion in criteria)
    decided = math.fsum(criterion.weight for criterion in criteria if criterion.value is not None)
    if not total or decided / total < rubric.spec.min_decided:
        return None
    if rubric.spec.aggregate == "mean":
        return weighted_mean(criteria)
    values = [value for answer in answers if (value := weighted_mean(answer.criteria)) is not None]
    return min(values) if rubric.spec.aggregate == "min" else math.prod(values)


def _add_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
