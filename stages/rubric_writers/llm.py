"""Decides how a model is asked for a rubric: it sees the picture, the committee's captions and the student's.

Its answer counts when each criterion names enough experts that bear it out and a caption of the student that fails it.
An answer that does not is asked for again, and then it is an error, never an empty rubric.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engines import Engine, Reply, Request
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import SEVERITY_WEIGHTS, RubricCriterion, Severity
from pipeline.sections import key
from pipeline.validation import read_toml
from stages.rubric_writers import Evidence, WrittenRubric
from stages.text.answers import read_value
from stages.text.json_schema import object_schema
from stages.text.prompts import (
    SamplingConfig,
    check_fields,
    fence_text,
    fill_template,
    hash_prompt,
    join_lines,
    list_fields,
    map_with_context,
)

if TYPE_CHECKING:
    from stages.rubric import Config

VERSION = 1
WORDS = "committee"  # what is asked where the section does not say
FIELDS = ("num_teachers", "num_agree", "max_criteria", "teachers", "student")
SEVERITIES: tuple[Severity, ...] = tuple(SEVERITY_WEIGHTS)  # gravest first


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """The TOML of what is asked."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(help="what is asked; {teachers} and {student} are the numbered captions, fenced")
    with_image: bool = key(True, "whether the writer sees the image")
    min_criteria: int = key(0, "of a rubric; 0: a student may miss nothing", least=0)
    max_criteria: int = key(12, "of a rubric", least=1)
    max_characters: int = key(240, "of a criterion", least=10)
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self.prompt, FIELDS, where="prompt")
        for name in ("teachers", "student"):
            if name not in list_fields(self.prompt):
                raise ValueError(f"prompt: must have {{{name}}}")
        if self.min_criteria > self.max_criteria:
            raise ValueError(f"min_criteria = {self.min_criteria} is more than max_criteria = {self.max_criteria}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    engine: str = key(help="a name in [engines]", stamp=False)
    spec: WriterSpec = key(stamp="words")


def prepare(config: Config, *, run: Path, field: str) -> Settings:
    """
    Raises:
        ConfigError: the section names no engine, or words that are not there or wrong.
    """
    if not config.engine:
        raise ConfigError(f"{field}.engine", "is missing: the writer llm asks a model, a name in [engines]")
    name = config.words or WORDS
    try:
        section = read_toml(name, folder="writers", run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.words", str(error)) from error
    return Settings(engine=config.engine, spec=section.parse(WriterSpec))


def engines(settings: Settings) -> tuple[str, ...]:
    return (settings.engine,)


def write(inputs: Iterable[Evidence], *, settings: Settings, engines: Mapping[str, Engine]) -> Iterator[WrittenRubric]:
    engine, spec = engines[settings.engine], settings.spec
    asked = ((evidence, request(evidence, spec)) for evidence in inputs)
    for evidence, reply in map_with_context(engine.generate, asked):
        yield _written(evidence, reply, settings, engine)


def request(evidence: Evidence, spec: WriterSpec) -> Request:
    return Request(
        id=evidence.key,
        system=spec.system,
        prompt=_prompt(evidence, spec),
        images=(evidence.data(),) if spec.with_image else (),
        source_key=evidence.source_key,
        schema=json.dumps(schema(evidence, spec)),
        ladder=spec.sampling.rungs,
        accept=lambda reply: _read(reply, evidence, spec)[1],
        seed=evidence.seed,
    )


def schema(evidence: Evidence, spec: WriterSpec) -> dict[str, Any]:
    """Of the answer: a list of criteria, each with its reason before it and its evidence after it."""
    criterion = {
        "reason": {"type": "string", "maxLength": spec.max_characters},
        "text": {"type": "string", "minLength": 1, "maxLength": spec.max_characters},
        "severity": {"type": "string", "enum": list(SEVERITIES)},
        "experts": _numbers(len(evidence.teachers), least=evidence.num_agree),
        "captions": _numbers(len(evidence.student), least=1),
    }
    bounds = {"minItems": spec.min_criteria, "maxItems": spec.max_criteria}
    listed = {"type": "array", "items": object_schema(criterion), **bounds}
    return object_schema({"criteria": listed})


def _prompt(evidence: Evidence, spec: WriterSpec) -> str:
    return fill_template(
        spec.prompt,
        {
            "num_teachers": str(len(evidence.teachers)),
            "num_agree": str(evidence.num_agree),
            "max_criteria": str(spec.max_criteria),
            "teachers": _listed("Expert", evidence.teachers),
            "student": _listed("The student's caption", evidence.student),
        },
    ).strip()


def _listed(who: str, captions: Sequence[str]) -> str:
    return "\n\n".join(f"{who} {number}:\n{fence_text(text)}" for number, text in enumerate(captions, start=1))


def _read(reply: Reply, evidence: Evidence, spec: WriterSpec) -> tuple[tuple[RubricCriterion, ...], str]:
    """The criteria in an answer, the gravest first, and what is wrong with it."""
    try:
        said = read_value(reply, schema(evidence, spec))["criteria"]
        return _demands(said, evidence), ""
    except ValueError as error:
        return (), str(error)


def _demands(said: Sequence[Mapping[str, Any]], evidence: Evidence) -> tuple[RubricCriterion, ...]:
    """
    Raises:
        ValueError: a criterion says nothing, or too few different experts bear it out.
    """
    found: dict[str, RubricCriterion] = {}
    for one in sorted(said, key=lambda one: SEVERITIES.index(one["severity"])):
        text, num_experts = join_lines(one["text"]), len(set(one["experts"]))
        if not any(map(str.isalnum, text)):
            raise ValueError(f"a criterion has no words: {text!r}")
        if num_experts < evidence.num_agree:
            raise ValueError(f"too few experts bear a criterion out: {num_experts} of {evidence.num_agree}: {text}")
        demand = RubricCriterion(
            id=f"{one['severity']}_{len(found) + 1}",
            text=text,
            severity=one["severity"],
            weight=SEVERITY_WEIGHTS[one["severity"]],
            agreed=num_experts,
            missed=len(set(one["captions"])) / len(evidence.student),
            claim=None,
        )
        found.setdefault(text.casefold(), demand)
    return tuple(found.values())


def _written(evidence: Evidence, reply: Reply, settings: Settings, engine: Engine) -> WrittenRubric:
    demands, problem = _read(reply, evidence, settings.spec)
    nothing = "" if demands else "there is nothing that the student misses"
    return WrittenRubric(
        criteria=demands,
        status="error" if problem else "ok" if demands else "empty",
        error=problem or nothing or None,
        prompt_hash=hash_prompt(settings.spec.system, settings.spec.prompt),
        num_prompt_tokens=reply.num_prompt_tokens,
        num_output_tokens=reply.num_output_tokens,
        attempt=reply.attempt,
        model=engine.model,
        revision=engine.revision,
        engine=settings.engine,
    )


def _numbers(most: int, *, least: int) -> dict[str, Any]:
    number = {"type": "integer", "enum": list(range(1, most + 1))}
    return {"type": "array", "items": number, "minItems": least, "maxItems": most}
