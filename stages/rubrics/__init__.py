"""Rubrics: questions with ordered answers and weights, and the prompt that puts them to a judge.

Rubrics are the TOML files of this directory and of `<run>/rubrics`. They do not know the judge.

Weights by severity, and the value sum(w * v) / sum(w), follow RubiCap (arXiv 2603.09160).
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
from stages.text.given import GivenKeys, OpenFields, Texts
from stages.text.json_schema import object_schema
from stages.text.prompts import NO_TEXT, SamplingConfig, fence_text, fill_template, join_lines, list_fields

ALT_TEXT = "alt_text"  # the field that needs no `given`
OWN_FIELDS = frozenset({"criteria", "caption", "before", "sentence"})
JUDGED = {"caption": "caption", "sentence": "sentence"}  # unit -> the prompt's field that holds it
UNASKED = ("dropped", "repeated")  # kinds of planted errors that a rubric is not about unless it names others
NOTHING: Texts = {}
NO_REASONS = "Leave out all reasons: give the verdicts only."


@dataclass(frozen=True, kw_only=True)
class Question:
    """One criterion of a rubric."""

    id: str = key(help="letters, digits and _")
    question: str = key(help="the question, precise enough for two readers to agree")
    answers: tuple[str, ...] = key(("no", "yes"), "from worst to best")
    values: tuple[float, ...] | None = key(None, "value of each answer, from 0 to 1; by default evenly spaced")
    severity: Severity = key("important", "critical weighs 3, important 2, minor 1")
    weight: float | None = key(None, "overrides the severity's weight", least=0)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.id):
            raise ValueError(f"id is {self.id!r}; it may have letters, digits and _ only")
        if len(self.answers) < 2 or len(set(self.answers)) < len(self.answers):
            raise ValueError(f"answers are {list(self.answers)}; at least two are needed, all different")
        values = list(self.by_answer.values())
        if len(self.values or values) != len(self.answers) or values != sorted(values):
            raise ValueError(f"values are {values}; they must be a number for each answer, from worst to best")
        if min(values) < 0 or max(values) > 1:
            raise ValueError(f"values are {values}; they must be between 0 and 1")

    @property
    def by_answer(self) -> Mapping[str, float]:
        """The value of each answer, [0, 1]."""
        even = [i / (len(self.answers) - 1) for i in range(len(self.answers))]
        return dict(zip(self.answers, self.values or even, strict=False))

    @property
    def effective_weight(self) -> float:
        return SEVERITY_WEIGHTS[self.severity] if self.weight is None else self.weight


@dataclass(frozen=True, kw_only=True)
class RubricSpec(GivenKeys):
    """The keys of a rubric's TOML file, except its criteria."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(
        help="the prompt; {caption} or {sentence} comes last, before it {criteria}, {alt_text}, {before} and any other"
        " {field}, which `given` of the score pass fills"
    )
    with_image: bool = key(True, "whether the judge sees the image")
    unit: Literal["caption", "sentence"] = key("caption", "what one request judges")
    aggregate: Literal["mean", "min", "product"] = key("mean", "of a caption's sentences: their mean, worst or product")
    unsure: str = key("cannot say", "the answer that leaves a question undecided; empty: not allowed")
    unasked: tuple[str, ...] = key(
        UNASKED, "kinds of planted errors that no question is about (docs/quality.md)", stamp=False
    )
    min_decided: float = key(0.5, "share of the weight to decide; below it the score is unknown", least=0, most=1)
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        last = JUDGED[self.unit]
        found = list_fields(self.prompt)[-1:]
        if found != [last]:
            why = f"it is {{{found[0]}}}" if found else "it has none"
            raise ValueError(
                f"prompt: its last field must be {{{last}}}, so that requests about an image share a prefix; {why}"
            )

    @property
    def open_fields(self) -> OpenFields:
        """Those that `given` fills; that of the alt text may be."""
        fields = frozenset(list_fields(self.prompt)) - OWN_FIELDS
        return OpenFields(prompt="its rubric", fields=fields, optional=frozenset({ALT_TEXT, *self.optional}))


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A rubric with its questions, whose order does not depend on the order in the file."""

    spec: RubricSpec = key(stamp="words")
    criteria: Mapping[str, Question]  # by id; the heaviest first, then in order of id
    with_reasons: bool = key(True, "ask for a reason before each verdict", stamp_default=False)

    @cached_property
    def allowed_verdicts(self) -> Mapping[str, list[str]]:
        """The answers to each question, by id, and the one that leaves it undecided."""
        unsure = [self.spec.unsure] if self.spec.unsure else []
        return {name: [*question.answers, *unsure] for name, question in self.criteria.items()}

    @property
    def is_bare(self) -> bool:
        """True if the answer is one verdict and nothing else: an object around it would cost more tokens than it."""
        return not self.with_reasons and len(self.criteria) == 1

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the answer: a reason, then a verdict; for several questions, by id."""
        verdicts = {name: {"type": "string", "enum": names} for name, names in self.allowed_verdicts.items()}
        if self.is_bare:
            return next(iter(verdicts.values()))
        reason = {"reason": {"type": "string"}} if self.with_reasons else {}
        answers = {name: object_schema({**reason, "verdict": verdict}) for name, verdict in verdicts.items()}
        return next(iter(answers.values())) if len(answers) == 1 else object_schema(answers)

    def is_echo(self, sentence: str) -> bool:
        """True if a sentence states nothing: it has no words, only those of the answers, or only those of the prompt
        and it speaks of itself."""
        words = _list_words(sentence)
        return words <= self._answer_words or (self.spec.unit in words and words <= self._own_words)

    @cached_property
    def _answer_words(self) -> frozenset[str]:
        return _list_words(" ".join(answer for verdicts in self.allowed_verdicts.values() for answer in verdicts))

    @cached_property
    def _own_words(self) -> frozenset[str]:
        questions = (question.question for question in self.criteria.values())
        return self._answer_words | _list_words(" ".join((self.spec.system, self.spec.prompt, *questions)))

    def verdicts(self, value: Any) -> Mapping[str, Mapping[str, str]]:
        """The reason and verdict of each question, by id, in an answer that follows the schema."""
        answer = {"verdict": value} if self.is_bare else value
        return answer if len(self.criteria) > 1 else dict.fromkeys(self.criteria, answer)

    def build_prompt(
        self, *, caption: str, sentence: str, alt_text: str | None, before: str = "", given: Texts = NOTHING
    ) -> str:
        """The prompt about one caption.

        Args:
            caption: the whole caption.
            sentence: the part to judge when the unit is a sentence; joined to one line.
            alt_text: the image's alt text.
            before: the sentences of the caption that precede the part to judge.
            given: texts about the image for the other fields; of the alt text, too.
        """
        no_reasons = () if self.with_reasons else (NO_REASONS,)
        fields = {
            ALT_TEXT: fence_text(alt_text) if alt_text and alt_text.strip() else NO_TEXT,
            **self.spec.fence_given(self.spec.open_fields.fields - {ALT_TEXT} | given.keys(), given),
            "criteria": "\n".join([*map(self._list_answers, self.criteria.values()), *no_reasons]),
            "caption": fence_text(caption),
            "before": fence_text(before),
            "sentence": join_lines(sentence),
        }
        return fill_template(self.spec.prompt, fields).strip()

    def _list_answers(self, question: Question) -> str:
        answers = ", ".join(f'"{answer}"' for answer in question.answers)
        unsure = f'; or "{self.spec.unsure}"' if self.spec.unsure else ""
        return f"- {question.id}: {question.question}\n  Answers, from worst to best: {answers}{unsure}"


def _list_words(text: str) -> frozenset[str]:
    """The words of a text, without case and a final s."""
    return frozenset(word.rstrip("s") for word in re.findall(r"\w+", text.casefold()))


def load(name: str, *, run: Path | None, with_reasons: bool = True) -> Rubric:
    """The rubric `name` of the run, else of those that ship.

    Raises:
        UnknownNameError: no such rubric exists.
        ConfigError: its file is not a valid rubric.
    """
    section = read_toml(name, folder="rubrics", run=run)
    spec = section.parse(RubricSpec, ignore=frozenset({"criteria"}))
    return Rubric(spec=spec, criteria=_parse_criteria(section, spec), with_reasons=with_reasons)


def load_judge_spec(name: str, *, run: Path | None) -> RubricSpec:
    """The rubric file `name` without criteria, whose prompt takes the criteria of each image's own rubric.

    Raises:
        UnknownNameError: no such file exists.
        ConfigError: it has criteria, or its prompt does not fit those of an image.
    """
    section = read_toml(name, folder="rubrics", run=run)
    if "criteria" in section.values:
        raise section.error("criteria", "are fixed in this file; choose one without: each image brings its own")
    spec = section.parse(RubricSpec)
    if "criteria" not in list_fields(spec.prompt) or spec.unit != "caption":
        raise section.error("prompt", "must have {criteria}, and {caption} last")
    if spec.unsure in ("no", "yes"):
        raise section.error("unsure", f"{spec.unsure!r} is also an answer of every criterion")
    return spec


def build_image_rubric(spec: RubricSpec, criteria: Iterable[RubricCriterion], *, with_reasons: bool = True) -> Rubric:
    """The rubric of one image, from its own criteria; each is answered no or yes."""
    questions = (Question(id=c.id, question=c.text, severity=c.severity, weight=c.weight) for c in criteria)
    return Rubric(spec=spec, criteria=_sort_questions(questions), with_reasons=with_reasons)


def _parse_criteria(section: Section, spec: RubricSpec) -> Mapping[str, Question]:
    tables = section.values.get("criteria")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise section.error("criteria", "there is none; write at least one [[criteria]] with an id and a question")
    sections = (Section(table, file=section.file, field=f"criteria[{i}]") for i, table in enumerate(tables))
    questions = [one.parse(Question) for one in sections]
    _check_questions(section, spec, questions)
    return _sort_questions(questions)


def _sort_questions(questions: Iterable[Question]) -> Mapping[str, Question]:
    return {q.id: q for q in sorted(questions, key=lambda q: (-q.effective_weight, q.id))}


def _check_questions(section: Section, spec: RubricSpec, questions: list[Question]) -> None:
    ids = [q.id for q in questions]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise section.error("criteria", f"{twice[0]!r} is the id of two criteria")
    if spec.unsure and any(spec.unsure in q.answers for q in questions):
        raise section.error("unsure", f"{spec.unsure!r} is also an answer of one of the criteria")
    if len(questions) > 1 and "criteria" not in list_fields(spec.prompt):
        raise section.error("prompt", "must have {criteria}: the rubric has several")
    if not any(q.effective_weight for q in questions):
        raise section.error("criteria", "at least one must have a weight above 0")
