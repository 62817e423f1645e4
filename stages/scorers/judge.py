"""Decides how a rubric is put to a model, and when its verdicts count.

All questions are asked in one request, or in one for each sentence; image and rubric stand first, the caption last. An
illegal verdict is the judge's failure, never the caption's: it is asked again, and then it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.engines import Engine, Reply, Request
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Criterion
from pipeline.sections import key
from stages import rubrics
from stages.rubrics import Question, Rubric
from stages.scorers import Sample, ScoreResult, weighted_mean
from stages.text.answers import read_value
from stages.text.prompts import derive_seed, map_with_context
from stages.text.sentences import split_sentences

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    engine: str = key(help="who judges: a name in [engines]")
    rubric: str = key("dense", "what is asked: a file of rubrics/, your own or one that ships")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A rubric and who is asked."""

    engine: str = key(help="a name in [engines]", stamp=False)
    rubric: Rubric = key(help="its words")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What one request judges: a caption, or a sentence of it."""

    sample: Sample
    rubric: Rubric
    images: tuple[bytes, ...]
    text: str
    suffix: str  # of its criteria's ids: "/1" for the first sentence; "" for a caption
    is_last: bool  # of its sample


@dataclass(frozen=True, kw_only=True)
class JudgeAnswer:
    """What came back for one part."""

    criteria: tuple[Criterion, ...]
    reply: Reply
    problem: str  # why they decide nothing


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: there is no such rubric, or it is wrong.
    """
    try:
        return Settings(engine=config.engine, rubric=rubrics.load(config.rubric, run=run))
    except UnknownNameError as error:
        raise ConfigError(f"{field}.rubric", str(error)) from error


def engines(config: Settings) -> Mapping[str, str]:
    return {"engine": config.engine}


def score(samples: Iterable[Sample], config: Settings, engines: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    """One mark for each sample."""
    return score_by_rubrics(((sample, config.rubric) for sample in samples), engine=config.engine, engines=engines)


def score_by_rubrics(
    samples: Iterable[tuple[Sample, Rubric]], *, engine: str, engines: Mapping[str, Engine]
) -> Iterator[ScoreResult]:
    """One mark for each sample, by the rubric beside it.

    Requests about one sample are adjacent, so that they share what stands before it.
    """
    model = engines[engine]
    parts = (part for sample, rubric in samples for part in _parts(sample, rubric))
    said: list[JudgeAnswer] = []
    for part, reply in map_with_context(model.generate, ((part, _request(part)) for part in parts)):
        said.append(_verdicts(part, reply))
        if part.is_last:
            yield _mark(said, part.rubric, name=engine, engine=model)
            said = []


def _parts(sample: Sample, rubric: Rubric) -> Iterator[Passage]:
    images = (sample.data(),) if rubric.spec.with_image else ()
    by_sentence = rubric.spec.unit == "sentence"
    texts = (by_sentence and split_sentences(sample.text)) or [sample.text]  # an empty text is judged too
    for number, text in enumerate(texts, start=1):
        suffix = f"/{number}" if by_sentence else ""
        is_last = number == len(texts)
        yield Passage(sample=sample, rubric=rubric, images=images, text=text, suffix=suffix, is_last=is_last)


def _request(part: Passage) -> Request:
    sample, rubric = part.sample, part.rubric
    return Request(
        id=f"{sample.key}/{sample.candidate}{part.suffix}",
        system=rubric.spec.system,
        prompt=rubric.build_prompt(caption=sample.text, sentence=part.text, alt_text=sample.alt_text),
        images=part.images,
        source_key=sample.source_key,
        schema=json.dumps(rubric.schema, ensure_ascii=False),
        ladder=rubric.spec.sampling.rungs,
        accept=lambda reply: _problem(reply, rubric),
        seed=derive_seed(sample.seed, part.suffix),
    )


def _problem(reply: Reply, rubric: Rubric) -> str:
    try:
        read_value(reply, rubric.schema)
    except ValueError as error:
        return str(error)
    return ""


def _verdicts(part: Passage, reply: Reply) -> JudgeAnswer:
    rubric = part.rubric
    problem = _problem(reply, rubric)
    said = {} if problem else rubric.verdicts(read_value(reply, rubric.schema))
    criteria = tuple(_criterion(q, said.get(q.id, {}), part.suffix) for q in rubric.criteria.values())
    return JudgeAnswer(criteria=criteria, reply=reply, problem=problem)


def _criterion(question: Question, said: Mapping[str, str], suffix: str) -> Criterion:
    verdict = said.get("verdict")
    value = None if verdict is None else question.by_answer.get(verdict)
    return Criterion(
        id=f"{question.id}{suffix}",
        verdict=None if value is None else verdict,
        value=value,
        weight=question.effective_weight,
        reason=said.get("reason"),
    )


def _mark(said: Sequence[JudgeAnswer], rubric: Rubric, *, name: str, engine: Engine) -> ScoreResult:
    criteria = tuple(criterion for verdicts in said for criterion in verdicts.criteria)
    failed = next((v.reply.error for v in said if v.reply.error is not None), None)
    value = None if failed else _value(said, rubric)
    unknown = next((v.problem for v in said if v.problem), "the judge could not say enough") if value is None else None
    return ScoreResult(
        value=value,
        criteria=criteria,
        status="error" if failed else "unknown" if value is None else "ok",
        error=failed or unknown,
        num_prompt_tokens=_total([v.reply.num_prompt_tokens for v in said]),
        num_output_tokens=_total([v.reply.num_output_tokens for v in said]),
        attempt=max(v.reply.attempt for v in said),
        model=engine.model,
        revision=engine.revision,
        engine=name,
    )


def _value(said: Sequence[JudgeAnswer], rubric: Rubric) -> float | None:
    """The mean over what was decided, of all or of the worst sentence; None when too little was."""
    criteria = [criterion for verdicts in said for criterion in verdicts.criteria]
    decided = weighted_mean(
        Criterion(id=c.id, verdict=None, value=float(c.value is not None), weight=c.weight, reason=None)
        for c in criteria
    )
    if decided is None or decided < rubric.spec.min_decided:
        return None
    if rubric.spec.aggregate == "mean":
        return weighted_mean(criteria)
    return min((v for verdicts in said if (v := weighted_mean(verdicts.criteria)) is not None), default=None)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
