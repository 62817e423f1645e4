"""Recipes of several questions: which are asked about an image, and which answers reach later steps and the caption.

They know neither engines nor pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from pipeline import plugins
from pipeline.errors import UnknownNameError
from pipeline.sections import stamped
from pipeline.storage.sentences import split_sentences
from pipeline.validation import Section
from stages.recipes._items import Item, list_tiles, pad_box
from stages.recipes._steps import (
    ALT_TEXT,
    ITEM,
    SENTENCES,
    ChainSpec,
    StepSpec,
    join_values,
    override_sampling,
    parse_steps,
    write_prose,
)
from stages.text import flags
from stages.text.chains import Answered, ChainError, Question, Questions, Show, Subject
from stages.text.given import Texts
from stages.text.prompts import (
    SamplingConfig,
    check_fields,
    fence_texts,
    fill_template,
    hash_prompt,
    join_lines,
    list_fields,
)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The answers of a step."""

    items: Sequence[Item]  # what it asked about, one for each answer
    answers: Sequence[Answered]
    spec: StepSpec

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that later prompts show of it: those that it kept, or else its answers."""
        pairs = zip(self.items, self.answers, strict=True)
        if self.spec.keep:
            return tuple(item.text for item, answer in pairs if self._is_kept(answer))
        return tuple(answer.text for answer in self.answers)

    def list_items(self, part: str) -> Iterator[Item]:
        """Its sentences, or the values of a list of its structured answers, each with the box that it is about."""
        for item, answer in zip(self.items, self.answers, strict=True):
            if self.spec.keep and not self._is_kept(answer):
                continue
            if part == SENTENCES:
                texts = split_sentences(item.text if self.spec.keep else answer.text)
            else:
                texts = [join_values(value) for value in answer.value.get(part, [])]
            yield from (Item(text=text, box=item.box) for text in texts if text.strip())

    def _is_kept(self, answer: Answered) -> bool:
        """As the judge does, it goes by the written answer where the engine gives no probabilities of this one."""
        if not self.spec.min_probability or answer.probabilities is None:
            return answer.text in self.spec.keep
        return sum(answer.probabilities[name] for name in self.spec.keep) >= self.spec.min_probability


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
        """The names that it needs of run.toml: "engine" or "finder", the name, and the field of its file."""
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
        samplings = (override_sampling(base, step.sampling) for step in self.steps) if self.steps else (base,)
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
            ladder = override_sampling(base, step.sampling).rungs
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
                    verdicts=step.answers if step.min_probability else (),
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
    steps = parse_steps(section, spec)
    if bool(steps) == bool(spec.program):
        raise section.error("program", "is in place of [[steps]]; a recipe has one of them")
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


def add_alt_text(given: Texts, alt_text: str | None) -> Texts:
    return {ALT_TEXT: (alt_text,) if alt_text and alt_text.strip() else (), **given}
