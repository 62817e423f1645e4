"""Decides what a rubric is: questions with ordered answers and weights, and the words that put them to a judge.

The rubrics are the TOML files of this folder and of `<run>/rubrics`. A rubric does not know who judges.

Weights by severity, and the value sum(w * v) / sum(w), are RubiCap's (arXiv 2603.09160).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.records import SEVERITY_WEIGHTS, RubricCriterion, Severity
from pipeline.sections import key
from pipeline.validation import Section, read_toml
from stages.text.json_schema import object_schema
from stages.text.prompts import SamplingConfig, check_fields, fence_text, fill_template, join_lines, list_fields

FIELDS = ("criteria", "alt_text", "caption", "sentence")
JUDGED = {"caption": "caption", "sentence": "sentence"}  # unit -> the field that holds what is judged
NO_ALT_TEXT = "(none)"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One criterion."""

    id: str = key(help="letters, digits and _")
    question: str = key(help="what is asked, so that no two readers would decide differently")
    answers: tuple[str, ...] = key(("no", "yes"), "from worst to best")
    values: tuple[float, ...] | None = key(None, "of the answers, from 0 to 1; by default spread evenly")
    severity: Severity = key("important", "weighs 3, 2 or 1")
    weight: float | None = key(None, "in the place of the severity's", least=0)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.id):
            raise ValueError(f"id is {self.id!r}; it has letters, digits and _ only")
        if len(self.answers) < 2 or len(set(self.answers)) < len(self.answers):
            raise ValueError(f"answers are {list(self.answers)}; there are at least two, all different")
        values = list(self.by_answer.values())
        if len(self.values or values) != len(self.answers) or values != sorted(values):
            raise ValueError("values has one number for each answer, from worst to best")
        if min(values) < 0 or max(values) > 1:
            raise ValueError("values lie between 0 and 1")

    @property
    def by_answer(self) -> Mapping[str, float]:
        """The value of each answer, [0, 1]."""
        even = [i / (len(self.answers) - 1) for i in range(len(self.answers))]
        return dict(zip(self.answers, self.values or even, strict=False))

    @property
    def effective_weight(self) -> float:
        return SEVERITY_WEIGHTS[self.severity] if self.weight is None else self.weight


@dataclass(frozen=True, kw_only=True)
class RubricSpec:
    """A rubric's TOML without its criteria."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(help="what is asked; {criteria} and {alt_text} first, then {caption} or {sentence}, last")
    with_image: bool = key(True, "whether the judge sees the image")
    unit: Literal["caption", "sentence"] = key("caption", "what one request judges")
    aggregate: Literal["mean", "min"] = key("mean", "of the sentences: all together, or the worst")
    unsure: str = key("cannot say", "the answer that decides nothing, allowed to every question; empty: not allowed")
    min_decided: float = key(0.5, "a smaller share of the weight decided makes the score unknown", least=0, most=1)
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self.prompt, FIELDS, where="prompt")
        wanted = JUDGED[self.unit]
        if list_fields(self.prompt)[-1:] != [wanted]:
            raise ValueError(f"prompt: {{{wanted}}} is its last field, so that requests about one image share a prefix")


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A rubric, ready to ask. Its questions stand in an order of their own, whatever order they were written in."""

    spec: RubricSpec = key(stamp="words")
    criteria: Mapping[str, Question]  # by id; the heaviest first, then by id

    @cached_property
    def schema(self) -> dict[str, Any]:
        """Of the answer: a reason, then a verdict; for several questions, each under its id."""
        forms = {name: self._form(q) for name, q in self.criteria.items()}
        return next(iter(forms.values())) if len(forms) == 1 else object_schema(forms)

    def verdicts(self, value: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """The reason and verdict of each question, from an answer that follows the schema."""
        return value if len(self.criteria) > 1 else dict.fromkeys(self.criteria, value)

    def build_prompt(self, *, caption: str, sentence: str, alt_text: str | None) -> str:
        """The prompt.

        Args:
            caption: the whole caption.
            sentence: the part of it that is judged, when the unit is a sentence; it is put on one line.
            alt_text: what came with the image.
        """
        fields = {
            "criteria": "\n".join(map(self._listed, self.criteria.values())),
            "alt_text": fence_text(alt_text) if alt_text and alt_text.strip() else NO_ALT_TEXT,
            "caption": fence_text(caption),
            "sentence": join_lines(sentence),
        }
        return fill_template(self.spec.prompt, fields).strip()

    def _listed(self, question: Question) -> str:
        answers = ", ".join(f'"{answer}"' for answer in question.answers)
        unsure = f'; or "{self.spec.unsure}"' if self.spec.unsure else ""
        return f"- {question.id}: {question.question}\n  Answers, from worst to best: {answers}{unsure}"

    def _answers(self, question: Question) -> list[str]:
        return [*question.answers, *([self.spec.unsure] if self.spec.unsure else [])]

    def _form(self, question: Question) -> dict[str, Any]:
        verdict = {"type": "string", "enum": self._answers(question)}
        return object_schema({"reason": {"type": "string"}, "verdict": verdict})


def load(name: str, *, run: Path | None) -> Rubric:
    """The rubric called `name`, the run's own before the ones that ship.

    Raises:
        UnknownNameError: there is no such rubric.
        ConfigError: something in it is wrong.
    """
    section = read_toml(name, folder="rubrics", run=run)
    spec = section.parse(RubricSpec, ignore=frozenset({"criteria"}))
    return Rubric(spec=spec, criteria=_criteria(section, spec))


def load_judge_spec(name: str, *, run: Path | None) -> RubricSpec:
    """Those of a file without criteria: with them a judge is asked by the criteria that each image has of its own.

    Raises:
        UnknownNameError: there is no such file.
        ConfigError: something in it is wrong.
    """
    section = read_toml(name, folder="rubrics", run=run)
    if "criteria" in section.values:
        raise section.error("criteria", "these are a rubric of its own; wanted are words that leave the criteria open")
    spec = section.parse(RubricSpec)
    if "criteria" not in list_fields(spec.prompt) or spec.unit != "caption":
        raise section.error("prompt", "must have {criteria}, and {caption} last")
    if spec.unsure in ("no", "yes"):
        raise section.error("unsure", f"{spec.unsure!r} is an answer of every criterion too")
    return spec


def build_image_rubric(spec: RubricSpec, demands: Iterable[RubricCriterion]) -> Rubric:
    """The rubric that an image has of its own, ready to ask: each criterion is met or not."""
    questions = [
        Question(id=demand.id, question=demand.text, severity=demand.severity, weight=demand.weight)
        for demand in demands
    ]
    return Rubric(spec=spec, criteria=_in_order(questions))


def _criteria(section: Section, spec: RubricSpec) -> Mapping[str, Question]:
    given = section.values.get("criteria")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise section.error("criteria", "there is none; write at least one [[criteria]] with an id and a question")
    parsed = [Section(one, file=section.file, field=f"criteria[{i}]").parse(Question) for i, one in enumerate(given)]
    _check(section, spec, parsed)
    return _in_order(parsed)


def _in_order(questions: Iterable[Question]) -> Mapping[str, Question]:
    return {q.id: q for q in sorted(questions, key=lambda q: (-q.effective_weight, q.id))}


def _check(section: Section, spec: RubricSpec, questions: list[Question]) -> None:
    ids = [q.id for q in questions]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise section.error("criteria", f"{twice[0]!r} is the id of two")
    if spec.unsure and any(spec.unsure in q.answers for q in questions):
        raise section.error("unsure", f"{spec.unsure!r} is an answer of one of the criteria too")
    if len(questions) > 1 and "criteria" not in list_fields(spec.prompt):
        raise section.error("prompt", "must have {criteria}: there are several")
    if not any(q.effective_weight for q in questions):
        raise section.error("criteria", "at least one must weigh more than 0")
