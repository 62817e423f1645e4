"""Rubrics written by a model that sees the image, the teachers' captions and the student's.

An answer is valid when each criterion names enough experts that support it and a caption of the student that fails it.
Invalid answers are retried; when retries are exhausted the status is error, never empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines import Engine, Reply, Request
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import SEVERITY_WEIGHTS, RubricCriterion, Severity
from pipeline.sections import key
from pipeline.validation import read_toml
from stages.rubric_writers import Evidence, WriterOptions, WrittenRubric
from stages.text.answers import read_value
from stages.text.given import GivenKeys, OpenFields
from stages.text.json_schema import object_schema
from stages.text.prompts import (
    SamplingConfig,
    fence_text,
    fill_template,
    hash_prompt,
    join_lines,
    list_fields,
    map_with_context,
)

VERSION = 1
DEFAULT_SPEC = "committee"
OWN_FIELDS = frozenset({"num_teachers", "num_agree", "max_criteria", "teachers", "student"})
SEVERITIES: tuple[Severity, ...] = tuple(SEVERITY_WEIGHTS)  # most severe first


@dataclass(frozen=True, kw_only=True)
class WriterSpec(GivenKeys):
    """The keys of a writer's TOML file, in this directory or in `<run>/writers`."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(
        help="the prompt; {teachers} and {student} are the numbered captions, fenced; any other {field} is filled by"
        " `given` of the rubric pass"
    )
    with_image: bool = key(True, "whether the writer sees the image")
    min_criteria: int = key(0, "criteria of a rubric, at least; 0: a student may miss nothing", least=0)
    max_criteria: int = key(12, "criteria of a rubric, at most", least=1)
    max_characters: int = key(240, "characters of a criterion, at most", least=10)
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teachers", "student"):
            if name not in list_fields(self.prompt):
                fields = ", ".join(f"{{{one}}}" for one in list_fields(self.prompt)) or "none"
                raise ValueError(f"prompt: must have {{{name}}}; it has {fields}")
        if self.min_criteria > self.max_criteria:
            raise ValueError(f"min_criteria = {self.min_criteria} is more than max_criteria = {self.max_criteria}")

    @property
    def open_fields(self) -> OpenFields:
        fields = frozenset(list_fields(self.prompt)) - OWN_FIELDS
        return OpenFields(prompt="its writer", fields=fields, optional=frozenset(self.optional))


@dataclass(frozen=True, kw_only=True)
class Settings:
    engine: str = key(help="a name in [engines]", stamp=False)
    spec: WriterSpec = key(stamp="words")


def prepare(config: WriterOptions, *, run: Path, field: str) -> Settings:
    """
    Raises:
        ConfigError: the section names no engine, or its `words` name no valid file.
    """
    if not config.engine:
        raise ConfigError(f"{field}.engine", "is missing: the writer llm needs a model, a name in [engines]")
    name = config.words or DEFAULT_SPEC
    try:
        section = read_toml(name, folder="writers", run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.words", str(error)) from error
    return Settings(engine=config.engine, spec=section.parse(WriterSpec))


def engines(settings: Settings) -> tuple[str, ...]:
    return (settings.engine,)


def open_fields(settings: Settings) -> OpenFields:
    return settings.spec.open_fields


def write(inputs: Iterable[Evidence], *, settings: Settings, engines: Mapping[str, Engine]) -> Iterator[WrittenRubric]:
    engine, spec = engines[settings.engine], settings.spec
    requests = ((evidence, build_request(evidence, spec)) for evidence in inputs)
    for evidence, reply in map_with_context(engine.generate, requests):
        yield _build_rubric(evidence, reply, settings, engine)


def build_request(evidence: Evidence, spec: WriterSpec) -> Request:
    return Request(
        id=evidence.key,
        system=spec.system,
        prompt=_build_prompt(evidence, spec),
        images=(evidence.data(),) if spec.with_image else (),
        source_key=evidence.source_key,
        schema=json.dumps(build_schema(evidence, spec)),
        ladder=spec.sampling.rungs,
        accept=lambda reply: _parse_answer(reply, evidence, spec)[1],
        seed=evidence.seed,
    )


def build_schema(evidence: Evidence, spec: WriterSpec) -> dict[str, Any]:
    """JSON Schema of the answer: a list of criteria, each with a reason first and its evidence last."""
    criterion = {
        "reason": {"type": "string", "maxLength": spec.max_characters},
        "text": {"type": "string", "minLength": 1, "maxLength": spec.max_characters},
        "severity": {"type": "string", "enum": list(SEVERITIES)},
        "experts": _number_list(len(evidence.teachers), least=evidence.num_agree),
        "captions": _number_list(len(evidence.student), least=1),
    }
    bounds = {"minItems": spec.min_criteria, "maxItems": spec.max_criteria}
    criteria = {"type": "array", "items": object_schema(criterion), **bounds}
    return object_schema({"criteria": criteria})


def _build_prompt(evidence: Evidence, spec: WriterSpec) -> str:
    return fill_template(
        spec.prompt,
        {
            **spec.fence_given(spec.open_fields.fields, evidence.texts),
            "num_teachers": str(len(evidence.teachers)),
            "num_agree": str(evidence.num_agree),
            "max_criteria": str(spec.max_criteria),
            "teachers": _number_captions("Expert", evidence.teachers),
            "student": _number_captions("The student's caption", evidence.student),
        },
    ).strip()


def _number_captions(author: str, captions: Sequence[str]) -> str:
    return "\n\n".join(f"{author} {number}:\n{fence_text(text)}" for number, text in enumerate(captions, start=1))


def _parse_answer(reply: Reply, evidence: Evidence, spec: WriterSpec) -> tuple[tuple[RubricCriterion, ...], str]:
    """The criteria of an answer, the most severe first, and the error when it is invalid."""
    try:
        return _parse_criteria(read_value(reply, build_schema(evidence, spec))["criteria"], evidence), ""
    except ValueError as error:
        return (), str(error)


def _parse_criteria(answer: Sequence[Mapping[str, Any]], evidence: Evidence) -> tuple[RubricCriterion, ...]:
    """
    Raises:
        ValueError: a criterion is empty, or has the support of too few different experts.
    """
    criteria: dict[str, RubricCriterion] = {}
    for one in sorted(answer, key=lambda one: SEVERITIES.index(one["severity"])):
        text, num_experts = join_lines(one["text"]), len(set(one["experts"]))
        if not any(map(str.isalnum, text)):
            raise ValueError(f"a criterion has no words: {text!r}")
        if num_experts < evidence.num_agree:
            raise ValueError(f"too few experts bear a criterion out: {num_experts} of {evidence.num_agree}: {text}")
        criterion = RubricCriterion(
            id=f"{one['severity']}_{len(criteria) + 1}",
            text=text,
            severity=one["severity"],
            weight=SEVERITY_WEIGHTS[one["severity"]],
            agreed=num_experts,
            missed=len(set(one["captions"])) / len(evidence.student),
            claim=None,
        )
        criteria.setdefault(text.casefold(), criterion)
    return tuple(criteria.values())


def _build_rubric(evidence: Evidence, reply: Reply, settings: Settings, engine: Engine) -> WrittenRubric:
    criteria, problem = _parse_answer(reply, evidence, settings.spec)
    nothing = "" if criteria else "there is nothing that the student misses"
    return WrittenRubric(
        criteria=criteria,
        status="error" if problem else "ok" if criteria else "empty",
        error=problem or nothing or None,
        prompt_hash=hash_prompt(settings.spec.system, settings.spec.prompt),
        num_prompt_tokens=reply.num_prompt_tokens,
        num_output_tokens=reply.num_output_tokens,
        attempt=reply.attempt,
        model=engine.model,
        revision=engine.revision,
        engine=settings.engine,
    )


def _number_list(most: int, *, least: int) -> dict[str, Any]:
    number = {"type": "integer", "enum": list(range(1, most + 1))}
    return {"type": "array", "items": number, "minItems": least, "maxItems": most}
