"""`[[steps]]` of a recipe: the keys of each step, and what a step may use of those before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline import plugins
from pipeline.sections import key
from pipeline.validation import Section
from stages.text import json_schema
from stages.text.answers import AnswerFormat
from stages.text.chains import Show
from stages.text.json_schema import object_schema
from stages.text.prompts import SamplingConfig, check_fields, fill_template, list_fields

ALT_TEXT, ITEM = "alt_text", "item"
NAME = re.compile(r"[a-z_]+")
TILES = re.compile(r"([1-9]\d*)x([1-9]\d*)")
FINDER, SENTENCES = "found", "sentences"  # found.NAME and STEP.sentences, in `each`
MAX_TILES = 64


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The keys of one `[[steps]]`."""

    name: str = key(help="letters and _; later steps have its answers as {name}")
    prompt: str = key(
        help="the question; {item} is what `each` goes through, {STEP} the answers of an earlier step, any other"
        " {field} as in a recipe's prompt"
    )
    system: str | None = key(None, "overrides the recipe's system message")
    show: Show = key(
        "whole", "what the model is shown: the whole image, none, the part that `each` goes through, or both of them"
    )
    each: str = key(
        "",
        'asks once for each of these: tiles of the image ("2x2"), the sentences of an earlier step ("STEP.sentences"),'
        ' a list in its structured answer ("STEP.FIELD"), or the boxes of a finder ("found.NAME"); empty: asks once',
    )
    max_items: int = key(32, "things that `each` goes through, at most; the first ones", least=1, most=256)
    answers: tuple[str, ...] = key((), "the allowed answers, each in words; empty: any text")
    reasons: bool = key(True, "with `answers`: have the model give a reason before its answer")
    keep: tuple[str, ...] = key(
        (), "the answers with which what `each` goes through is kept; {name} is then what was kept"
    )
    min_probability: float = key(
        0.0,
        "with `keep`: keeps what has these answers with at least this probability, all together, by the engine's"
        " log-probabilities; 0: the answer that was written decides",
        least=0,
        most=1,
    )
    schema: dict[str, Any] | None = key(None, "JSON Schema of a structured answer, an object")
    text: str = key("", "a template that turns the fields of a structured answer into prose; empty: all, in order")
    engine: str = key("", "a name in [engines]; empty: the engine of the pass", stamp=False)
    sampling: dict[str, Any] = key(factory=dict, help="overrides the recipe's [sampling], key by key")

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name in (ALT_TEXT, ITEM, FINDER):
            raise ValueError(
                f"name is {self.name!r}; it may have small letters and _ only, and be none of alt_text, found and item"
            )
        if (ITEM in list_fields(self.prompt)) and not self.each:
            raise ValueError("prompt has {item}, which needs `each`")
        if len(set(self.answers)) == 1 or len(set(self.answers)) < len(self.answers):
            raise ValueError(f"answers are {list(self.answers)}; at least two are needed, all different")
        if unknown := [answer for answer in self.keep if answer not in self.answers]:
            raise ValueError(
                f"keep: {plugins.explain_unknown(unknown[0], list(self.answers))}, the answers of the step"
            )
        if self.keep and not self.each:
            raise ValueError("keep: needs `each`, whose things it chooses from")
        if self.min_probability and not self.keep:
            raise ValueError("min_probability: needs `keep`, the answers whose probability it bounds")
        if self.answers and self.schema is not None:
            raise ValueError("answers and schema exclude each other")
        if self.schema is not None:
            json_schema.check_schema(self.schema)
            check_fields(self.text, self.schema.get("properties", {}), where="text")
        elif self.text:
            raise ValueError("text: is for a structured answer; the step has no schema")

    @property
    def tiles(self) -> tuple[int, int] | None:
        """Columns and rows, where `each` goes through tiles."""
        match = TILES.fullmatch(self.each)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def finder(self) -> str:
        """The finder whose boxes `each` goes through; "": none."""
        source, _, name = self.each.partition(".")
        return name if source == FINDER else ""

    @property
    def source(self) -> tuple[str, str]:
        """The earlier step and what of its answers `each` goes through; ("", ""): no step."""
        if self.tiles or self.finder or not self.each:
            return "", ""
        name, _, part = self.each.partition(".")
        return name, part

    @cached_property
    def answer_format(self) -> AnswerFormat | None:
        """None: prose."""
        if self.answers:
            reason = {"reason": {"type": "string"}} if self.reasons else {}
            verdict = {"verdict": {"type": "string", "enum": list(self.answers)}}
            return AnswerFormat(schema=object_schema({**reason, **verdict}), to_prose=lambda value: value["verdict"])
        return None if self.schema is None else AnswerFormat(schema=self.schema, to_prose=self._write_prose)

    def _write_prose(self, value: Mapping[str, Any]) -> str:
        if not self.text:
            return join_values(list(value.values()))
        return write_prose(self.text, value)


@dataclass(frozen=True, kw_only=True)
class ChainSpec:
    """The keys of a recipe of several questions, except its steps."""

    system: str = key("", "the system message of steps that have none; empty: none")
    program: str = key(
        "", "a module of your own that asks the questions, in place of steps: my_project.module, see docs/extending.md"
    )
    max_alt_text: int = key(1000, "characters of alt text to show", least=1)
    max_given: int = key(6000, "characters of each other field to show, of all of its texts together", least=100)
    required: tuple[str, ...] = key((), "fields without which the model is not asked")
    optional: tuple[str, ...] = key((), "fields that `given` may leave out; (none) is shown", stamp=False)
    text: str = key(
        "", 'a template of steps that makes the caption, e.g. "{draft} {kept}"; empty: the last step\'s text'
    )
    flags: str = key("english", "the flags to look for in answers: a file of flags/")
    sampling: SamplingConfig = key(factory=SamplingConfig)


def parse_steps(section: Section, spec: ChainSpec) -> tuple[StepSpec, ...]:
    """The `[[steps]]` of a recipe, () without them.

    Raises:
        ConfigError: a key is unknown or wrong, or a step uses what it cannot have.
    """
    steps = tuple(_read_steps(section, spec)) if "steps" in section.values else ()
    for place, step in enumerate(steps):
        _check_step(Section({}, file=section.file, field=f"steps[{place}]"), step, steps, place)
    return steps


def _read_steps(section: Section, spec: ChainSpec) -> Iterator[StepSpec]:
    tables = section.values["steps"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise section.error("steps", "there is none; write at least one [[steps]] with a name and a prompt")
    for place, table in enumerate(tables):
        one = Section(table, file=section.file, field=f"steps[{place}]")
        step = one.parse(StepSpec)
        sampling = one.subsection("sampling")
        sampling.parse(SamplingConfig)
        try:
            override_sampling(spec.sampling, step.sampling)
        except ValueError as error:
            raise sampling.error("", str(error)) from error
        yield step


def _check_step(section: Section, step: StepSpec, steps: Sequence[StepSpec], place: int) -> None:
    """
    Raises:
        ConfigError: the step has another's name, uses a later one, or goes through what there is not.
    """
    names, earlier = [one.name for one in steps], {one.name: one for one in steps[:place]}
    if step.name in earlier:
        raise section.error("name", f"{step.name!r} is the name of an earlier step too; each step needs its own")
    if late := [name for name in list_fields(step.prompt) if name in names[place:]]:
        what = "the step itself" if late[0] == step.name else "a later step"
        known = ", ".join(earlier) or "(none)"
        raise section.error("prompt", f"{{{late[0]}}} is {what}; it may have the steps before it: {known}")
    if step.each:
        _check_each(section, step, earlier)
    if step.show in ("crop", "both") and not _has_boxes(step, earlier):
        raise section.error(
            "show",
            f'{step.show!r} needs a part of the image; set each to tiles ("2x2"), to the boxes of a finder'
            ' ("found.NAME"), or to an earlier step that has them',
        )


def _check_each(section: Section, step: StepSpec, earlier: Mapping[str, StepSpec]) -> None:
    if step.tiles:
        if step.tiles[0] * step.tiles[1] > MAX_TILES:
            raise section.error("each", f"{step.each!r} are more than {MAX_TILES} tiles")
        return
    if step.finder:
        return
    name, part = step.source
    if name not in earlier or not part:
        forms = '"2x2" tiles, "STEP.sentences", "STEP.FIELD" with an earlier step, or "found.NAME" with a finder'
        reason = f": {plugins.explain_unknown(name, list(earlier))}" if part else ""
        raise section.error("each", f"{step.each!r} is none of {forms}{reason}")
    other = earlier[name]
    if part == SENTENCES:
        if other.answers and not other.keep:
            raise section.error("each", f"the step {name} has no sentences: its answers are {', '.join(other.answers)}")
        return
    properties = (other.schema or {}).get("properties", {})
    lists = [field for field, one in properties.items() if isinstance(one, dict) and one.get("type") == "array"]
    if part not in lists:
        known = ", ".join([SENTENCES, *lists])
        raise section.error("each", f"the step {name} has no list {part!r} in its schema; it has {known}")


def _has_boxes(step: StepSpec, earlier: Mapping[str, StepSpec]) -> bool:
    if step.tiles or step.finder:
        return True
    name, _ = step.source
    return name in earlier and _has_boxes(earlier[name], earlier)


def override_sampling(base: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    return replace(base, **values)


def write_prose(template: str, values: Mapping[str, Any], separator: str = ", ") -> str:
    """A template filled with values, on one line."""
    fields = {name: join_values(values.get(name), separator) for name in list_fields(template)}
    return " ".join(fill_template(template, fields).split())


def join_values(value: Any, separator: str = ", ") -> str:
    """A JSON value in words."""
    if isinstance(value, Mapping):
        return join_values(list(value.values()), separator)
    if isinstance(value, list):
        return separator.join(filter(None, (join_values(one, separator) for one in value)))
    return "" if value is None else str(value).strip()
