"""`[[steps]]` of a recipe: the chain of questions of which the answers make one caption.

Decides what each step is asked about and what of its answers goes on. It knows neither engines nor pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from pipeline import plugins
from pipeline.errors import UnknownNameError
from pipeline.sections import key, stamped
from pipeline.storage.sentences import split_sentences
from pipeline.validation import Section
from stages.text import flags, json_schema
from stages.text.answers import AnswerFormat
from stages.text.chains import Answered, Box, ChainError, Question, Questions, Show, Subject
from stages.text.given import Texts
from stages.text.json_schema import object_schema
from stages.text.prompts import (
    SamplingConfig,
    check_fields,
    fence_texts,
    fill_template,
    hash_prompt,
    join_lines,
    list_fields,
)

ALT_TEXT, ITEM = "alt_text", "item"
NAME = re.compile(r"[a-z_]+")
TILES = re.compile(r"([1-9]\d*)x([1-9]\d*)")
FINDER, SENTENCES = "found", "sentences"  # found.NAME and STEP.sentences, in `each`
MAX_TILES = 64
OVERLAP = 0.2  # of a tile's side that it shares with its neighbours, in all
MARGIN = 0.1  # of a thing's box, that is shown around it on each side
MIN_SIDE = 28  # pixels of what is shown of a thing
MAX_ASPECT = 20  # of what is shown of a thing: longer strips are widened


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


@dataclass(frozen=True, kw_only=True)
class Item:
    """One of the things that a step asks about."""

    text: str  # for {item}: a sentence, the name of a tile, what a thing is
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The answers of a step."""

    items: Sequence[Item]  # what it asked about, one for each answer
    answers: Sequence[Answered]
    spec: StepSpec

    @property
    def texts(self) -> tuple[str, ...]:
        """What later prompts show of it: what it kept, or else its answers."""
        if self.spec.keep:
            pairs = zip(self.items, self.answers, strict=True)
            return tuple(item.text for item, answer in pairs if answer.text in self.spec.keep)
        return tuple(answer.text for answer in self.answers)

    def list_items(self, part: str) -> Iterator[Item]:
        """Its sentences, or the values of a list of its structured answers, each with the box that it is about."""
        for item, answer in zip(self.items, self.answers, strict=True):
            if self.spec.keep and answer.text not in self.spec.keep:
                continue
            if part == SENTENCES:
                texts = split_sentences(item.text if self.spec.keep else answer.text)
            else:
                texts = [join_values(value) for value in answer.value.get(part, [])]
            yield from (Item(text=text, box=item.box) for text in texts if text.strip())


@dataclass(frozen=True, kw_only=True)
class ChainRecipe:
    """A recipe of several questions, with its flags."""

    name: str  # of its file
    spec: ChainSpec
    steps: tuple[StepSpec, ...]  # (): a program
    program: ModuleType | None
    flags: flags.Patterns

    @property
    def fields(self) -> frozenset[str]:
        """The fields that are filled by `given` and the alt text."""
        own = {step.name for step in self.steps}
        used = {name for step in self.steps for name in list_fields(step.prompt)}
        return frozenset({*used, *self.spec.required, *self.spec.optional} - own - {ITEM})

    @property
    def slice(self) -> dict[str, Any]:
        """All that decides a caption except models and the recipe's sampling, as JSON values."""
        program = {"program": self.spec.program, "program_version": getattr(self.program, "VERSION", 1)}
        return {
            "system": self.spec.system,
            "steps": [stamped(step) for step in self.steps],
            "text": self.spec.text,
            "max_alt_text": self.spec.max_alt_text,
            "max_given": self.spec.max_given,
            "required": sorted(self.spec.required),
            "flags": {flag: list(expressions) for flag, expressions in self.flags.items()},
            **(program if self.program else {}),
        }

    def assign_engines(self, engines: Mapping[str, str]) -> ChainRecipe:
        """The recipe with other engines for some steps, by name."""
        steps = tuple(replace(step, engine=engines.get(step.name, step.engine)) for step in self.steps)
        return replace(self, steps=steps)

    def list_names(self) -> Iterator[tuple[str, str, str]]:
        """What it needs of run.toml: "engine" or "finder", the name, and the field that names it, of its file."""
        for place, step in enumerate(self.steps):
            if step.engine:
                yield "engine", step.engine, f"steps[{place}].engine"
            if step.finder:
                yield "finder", step.finder, f"steps[{place}].each"
        for kind, names in (("engine", "ENGINES"), ("finder", "FINDERS")):
            yield from (
                (kind, name, f"program {self.spec.program}: {names}") for name in getattr(self.program, names, ())
            )

    def list_shown(self) -> Iterator[tuple[str, Show]]:
        """For each step its engine, "" being that of the pass, and what it shows; a program shows the whole image."""
        yield from ((step.engine, step.show) for step in self.steps)
        if self.program is not None:
            yield from ((name, "whole") for name in ("", *getattr(self.program, "ENGINES", ())))

    @cached_property
    def prompt_hash(self) -> str:
        """16 hex digits that identify the fixed texts of all prompts."""
        parts = (
            (step.system if step.system is not None else self.spec.system, step.prompt, json.dumps(step.schema))
            for step in self.steps
        )
        return hash_prompt(self.spec.program, *(text for some in parts for text in some))

    def list_temperatures(self, base: SamplingConfig) -> list[float]:
        """Those of the first attempts of all steps, where `base` is the sampling of those without their own."""
        samplings = (_override_sampling(base, step.sampling) for step in self.steps) if self.steps else (base,)
        return [sampling.temperature for sampling in samplings]

    def find_missing(self, alt_text: str | None, given: Texts) -> str:
        """The first required field that has no text; "" if there is none."""
        texts = add_alt_text(given, alt_text)
        return next((name for name in self.spec.required if not texts.get(name)), "")

    def find_flags(self, text: str) -> tuple[str, ...]:
        prompts = "\n".join([self.spec.system, *(step.prompt for step in self.steps)])
        return flags.find_flags(text, self.flags, prompt=prompts) if text else ()

    def open(self, subject: Subject, base: SamplingConfig) -> Questions:
        """The questions about one image.

        Args:
            subject: the image.
            base: the sampling of steps without their own.
        """
        if self.program is not None:
            questions: Questions = self.program.ask(subject)
            return questions
        return self._ask_steps(subject, base)

    def _ask_steps(self, subject: Subject, base: SamplingConfig) -> Generator[list[Question], list[Answered], Answered]:
        if missing := self.find_missing(subject.image.alt_text, subject.texts):
            raise ChainError("empty", f"a required field has no text: {missing}")
        done: dict[str, StepResult] = {}
        for step in self.steps:
            items = list(_list_items(step, subject, done))[: step.max_items]
            fields = self._fill_fields(step, subject, done)
            ladder = _override_sampling(base, step.sampling).rungs
            system = self.spec.system if step.system is None else step.system
            questions = [
                Question(
                    step=step.name,
                    prompt=fill_template(step.prompt, {**fields, ITEM: join_lines(item.text)}).strip(),
                    item=item.text if step.each else None,
                    show=step.show,
                    box=item.box,
                    system=system,
                    engine=step.engine,
                    answer_format=step.answer_format,
                    ladder=ladder,
                )
                for item in items
            ]
            done[step.name] = StepResult(items=items, answers=(yield questions), spec=step)
        return self._finish(done)

    def _fill_fields(self, step: StepSpec, subject: Subject, done: Mapping[str, StepResult]) -> dict[str, str]:
        texts = {
            **add_alt_text(subject.texts, subject.image.alt_text),
            **{name: one.texts for name, one in done.items()},
        }
        limits = {ALT_TEXT: self.spec.max_alt_text}
        return {
            name: fence_texts(texts.get(name, ()), limit=limits.get(name, self.spec.max_given))
            for name in list_fields(step.prompt)
            if name != ITEM
        }

    def _finish(self, done: Mapping[str, StepResult]) -> Answered:
        last = done[self.steps[-1].name]
        if self.spec.text:
            return Answered(
                text=write_prose(self.spec.text, {name: list(one.texts) for name, one in done.items()}, " ")
            )
        (fields,) = (answer.fields for answer in last.answers) if len(last.answers) == 1 else (None,)
        return Answered(text=" ".join(last.texts), fields=fields if last.spec.schema is not None else None)


def parse_chain(section: Section, load_flags: Callable[[str], flags.Patterns]) -> ChainRecipe:
    """A recipe of several questions.

    Raises:
        ConfigError: a key is unknown or wrong, or a step uses what it cannot have.
    """
    spec = section.parse(ChainSpec, ignore=frozenset({"steps"}))
    steps = tuple(_parse_steps(section, spec)) if "steps" in section.values else ()
    if bool(steps) == bool(spec.program):
        raise section.error("program", "is in place of [[steps]]; a recipe has one of them")
    for place, step in enumerate(steps):
        _check_step(Section({}, file=section.file, field=f"steps[{place}]"), step, steps, place)
    try:
        check_fields(spec.text, [step.name for step in steps], where="text")
    except ValueError as error:
        raise section.error("", str(error)) from error
    recipe = ChainRecipe(
        name=section.file.stem,
        spec=spec,
        steps=steps,
        program=_load_program(section, spec) if spec.program else None,
        flags=load_flags(spec.flags),
    )
    for key_name, names in (("required", spec.required), ("optional", spec.optional)):
        used = {name for step in steps for name in list_fields(step.prompt)}
        if steps and (unknown := [name for name in names if name not in used]):
            raise section.error(key_name, f"no step's prompt has {{{unknown[0]}}}")
    if both := set(spec.required) & set(spec.optional):
        raise section.error("required", f"{min(both)} is required and optional; it is one of them")
    return recipe


def _load_program(section: Section, spec: ChainSpec) -> ModuleType:
    if "." not in spec.program:
        raise section.error(
            "program", f"{spec.program!r} has no dot; write the module as in `import my_project.module`"
        )
    try:
        module = plugins.load("stages.recipes", spec.program)
    except UnknownNameError as error:
        raise section.error("program", str(error)) from error
    if not callable(getattr(module, "ask", None)):
        raise section.error("program", f"{spec.program!r} has no function ask(subject) that yields questions")
    return module


def _parse_steps(section: Section, spec: ChainSpec) -> Iterator[StepSpec]:
    tables = section.values["steps"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise section.error("steps", "there is none; write at least one [[steps]] with a name and a prompt")
    for place, table in enumerate(tables):
        one = Section(table, file=section.file, field=f"steps[{place}]")
        step = one.parse(StepSpec)
        sampling = one.subsection("sampling")
        sampling.parse(SamplingConfig)
        try:
            _override_sampling(spec.sampling, step.sampling)
        except ValueError as error:
            raise sampling.error("", str(error)) from error
        yield step


def _override_sampling(base: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    return replace(base, **values)


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


def _list_items(step: StepSpec, subject: Subject, done: Mapping[str, StepResult]) -> Iterator[Item]:
    if step.tiles:
        yield from list_tiles(*step.tiles)
    elif step.finder:
        yield from _list_found(step, subject)
    elif step.each:
        name, part = step.source
        seen: set[str] = set()
        for item in done[name].list_items(part):
            if item.text not in seen:  # tiles overlap: what two of them show is asked about once
                seen.add(item.text)
                yield item
    else:
        yield Item(text="")


def _list_found(step: StepSpec, subject: Subject) -> Iterator[Item]:
    """The things with boxes that a finder found, in its order.

    Raises:
        ChainError: it failed on this image.
    """
    finding = subject.findings[step.finder]
    if finding.status != "ok":
        raise ChainError("error", f"step {step.name}: the finder {step.finder} failed: {finding.error}")
    for one in finding.found:
        if one.x0 is not None and one.y0 is not None and one.x1 is not None and one.y1 is not None:
            text = f"{one.label}: {one.text}" if one.text else one.label
            image = subject.image
            yield Item(text=text, box=pad_box((one.x0, one.y0, one.x1, one.y1), image.width or 1, image.height or 1))


def list_tiles(columns: int, rows: int) -> Iterator[Item]:
    """Tiles that cover the picture and overlap, row by row.

    >>> [(tile.text, tile.box) for tile in list_tiles(2, 1)]
    [('left', (0.0, 0.0, 0.6, 1.0)), ('right', (0.4, 0.0, 1.0, 1.0))]
    """
    across, down = _cut_side(columns, ("left", "right")), _cut_side(rows, ("top", "bottom"))
    for top, bottom, row in down:
        for left, right, column in across:
            name = " ".join(filter(None, (row, column))) or ("centre" if columns * rows > 1 else "whole")
            yield Item(text=name, box=(left, top, right, bottom))


def _cut_side(num: int, ends: tuple[str, str]) -> list[tuple[float, float, str]]:
    """The beginning, end and name of each of `num` overlapping parts of a side of length 1."""
    size = 1.0 if num == 1 else (1 + OVERLAP) / num
    step = 0.0 if num == 1 else (1 - size) / (num - 1)
    names = [""] * num
    if num in (2, 3):
        names[0], names[-1] = ends
    elif num > 3:
        names = [f"{'column' if ends[0] == 'left' else 'row'} {n} of {num}" for n in range(1, num + 1)]
    return [(round(n * step, 5), round(min(1.0, n * step + size), 5), name) for n, name in enumerate(names)]


def pad_box(box: Box, width: int, height: int) -> Box:
    """A box with a margin, at least MIN_SIDE pixels wide and high and no strip, cut to the picture.

    Args:
        box: in shares of the picture.
        width, height: of the picture in pixels.
    """
    sides = [(box[0] * width, box[2] * width, width), (box[1] * height, box[3] * height, height)]
    lengths = [(end - start) * (1 + 2 * MARGIN) for start, end, _ in sides]
    least = max(MIN_SIDE, max(lengths) / MAX_ASPECT)
    left, right, top, bottom = (
        min(1.0, max(0.0, (middle + sign * max(length, least) / 2) / whole))
        for (start, end, whole), length in zip(sides, lengths, strict=True)
        for middle in ((start + end) / 2,)
        for sign in (-1, 1)
    )
    return (round(left, 5), round(top, 5), round(right, 5), round(bottom, 5))


def add_alt_text(given: Texts, alt_text: str | None) -> Texts:
    return {ALT_TEXT: (alt_text,) if alt_text and alt_text.strip() else (), **given}


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
