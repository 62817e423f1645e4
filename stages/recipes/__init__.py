"""Recipes for captions: the prompt, the format of the answer and the sampling, or a chain of steps.

Recipes are the TOML files of this directory and of `<run>/recipes`. They know neither engines nor pixels; of a sample
they see the alt text and what `given` of its caption pass has about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.engines import Reply
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.sections import Run, key
from pipeline.validation import read_toml
from stages.recipes import _chains, _items
from stages.recipes._examples import RecipeExample, read_examples
from stages.recipes._steps import ALT_TEXT
from stages.text import flags, json_schema
from stages.text.answers import AnswerFormat, read_answer
from stages.text.chains import Show
from stages.text.given import GivenTexts, OpenFields, Texts, fill_fields
from stages.text.prompts import SamplingConfig, check_fields, fence_texts, fill_template, hash_prompt, list_fields

ChainRecipe = _chains.ChainRecipe
list_tiles = _items.list_tiles
NOTHING: Texts = {}


@dataclass(frozen=True, kw_only=True)
class CaptionPrompt:
    """The prompt of one request."""

    prompt: str
    template: str  # without the sample's alt text
    hash: str  # of all that is the same for every image


@dataclass(frozen=True, kw_only=True)
class RecipeSpec:
    """The keys of a recipe's TOML file."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(
        help="the prompt; {alt_text} is replaced by the sample's alt text, any other {field} by `given` of the caption"
        " pass, fenced"
    )
    prompt_without_alt_text: str | None = key(None, "the prompt for samples without alt text")
    max_alt_text: int = key(1000, "characters of alt text to show", least=1)
    max_given: int = key(6000, "characters of each other field to show, of all of its texts together", least=100)
    required: tuple[str, ...] = key(
        (), "fields without which the model is not asked: the caption is then empty, and its error says which"
    )
    optional: tuple[str, ...] = key(
        (), "fields that `given` may leave out; (none) is shown, as for one without a text", stamp=False
    )
    examples: str = key(
        "",
        "a folder of pictures, each with its text in NAME.txt beside it, shown as earlier questions and answers; a"
        " relative path begins at the run's folder",
        stamp=False,
    )
    image: bool = key(True, "whether the model is shown the image")
    schema: dict[str, Any] | None = key(None, "JSON Schema of a structured answer, an object")
    text: str = key("", "a template that turns the fields of a structured answer into prose")
    flags: str = key("english", "the flags to look for in answers: a file of flags/")
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        uses_alt_text = ALT_TEXT in list_fields(self.prompt)
        if uses_alt_text and self.prompt_without_alt_text is None and ALT_TEXT not in self.required:
            raise ValueError(
                "prompt uses {alt_text}: prompt_without_alt_text is needed for samples without one, or"
                ' required = ["alt_text"]'
            )
        if ALT_TEXT in list_fields(self.prompt_without_alt_text or ""):
            raise ValueError("prompt_without_alt_text: {alt_text} is not a field of it")
        for key_name, names in (("required", self.required), ("optional", self.optional)):
            if unknown := [name for name in names if name not in self.fields]:
                raise ValueError(f"{key_name}: the prompt has no {{{unknown[0]}}}")
        if both := set(self.required) & set(self.optional):
            raise ValueError(f"{min(both)} is required and optional; it is one of them")
        if not self.image and not self.fields:
            raise ValueError("image = false: the prompt has no {field}, so the model would know nothing of the image")
        if self.examples and not self.image:
            raise ValueError("examples are pictures with texts, and image = false shows none; remove one of the keys")
        if self.schema is not None:
            json_schema.check_schema(self.schema)
            check_fields(self.text, self.schema.get("properties", {}), where="text")
        if (self.schema is None) != (not self.text):
            raise ValueError("schema and text need each other: text turns the fields into prose")

    @property
    def fields(self) -> frozenset[str]:
        """The names of the fields of its prompts."""
        return frozenset(list_fields(self.prompt + (self.prompt_without_alt_text or "")))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with its flags."""

    spec: RecipeSpec
    flags: flags.Patterns
    examples: tuple[RecipeExample, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        return self.spec.fields

    @property
    def slice(self) -> dict[str, Any]:
        """All that decides a caption except the sampling, as JSON values; the order of the schema's fields counts."""
        return {
            "system": self.spec.system,
            "prompt": self.spec.prompt,
            "prompt_without_alt_text": self.spec.prompt_without_alt_text,
            "max_alt_text": self.spec.max_alt_text,
            "schema": self.schema,
            "text": self.spec.text,
            "flags": {flag: list(expressions) for flag, expressions in self.flags.items()},
            # of recipes that use what earlier ones did not have
            **({"max_given": self.spec.max_given} if self.spec.fields - {ALT_TEXT} else {}),
            **({"required": sorted(self.spec.required)} if self.spec.required else {}),
            **({} if self.spec.image else {"image": False}),
            **({"examples": [one.stamp for one in self.examples]} if self.examples else {}),
        }

    @cached_property
    def schema(self) -> str | None:
        """JSON of the answer's schema, in the order in which fields are to be written."""
        return None if self.spec.schema is None else json.dumps(self.spec.schema, ensure_ascii=False)

    @cached_property
    def answer_format(self) -> AnswerFormat | None:
        return None if self.spec.schema is None else AnswerFormat(schema=self.spec.schema, to_prose=self._write_prose)

    def build_prompt(self, alt_text: str | None, given: Texts = NOTHING) -> CaptionPrompt:
        """The prompt for an image with this alt text, unless it is given too, and these texts."""
        template, texts = self.spec.prompt, _chains.add_alt_text(given, alt_text)
        if ALT_TEXT in list_fields(template) and not texts[ALT_TEXT] and self.spec.prompt_without_alt_text is not None:
            template = self.spec.prompt_without_alt_text
        limits = {ALT_TEXT: self.spec.max_alt_text}
        shown = {
            name: fence_texts(texts.get(name, ()), limit=limits.get(name, self.spec.max_given))
            for name in list_fields(template)
        }
        return CaptionPrompt(
            prompt=fill_template(template, shown).strip(),
            template=template,
            hash=hash_prompt(self.spec.system, template, self.schema or ""),
        )

    @cached_property
    def shown_examples(self) -> tuple[tuple[str, str], ...]:
        """The examples as earlier questions, about an image of which there are no texts, and their answers."""
        prompt = self.build_prompt(None).prompt
        return tuple((prompt, one.text) for one in self.examples)

    def list_names(self) -> Iterator[tuple[str, str, str]]:
        """As `ChainRecipe` has it: what it needs of run.toml besides the engine of its pass."""
        return iter(())

    def list_shown(self) -> Iterator[tuple[str, Show]]:
        yield "", "whole" if self.spec.image else "none"

    def list_temperatures(self, base: SamplingConfig) -> list[float]:
        return [base.temperature]

    def find_missing(self, alt_text: str | None, given: Texts = NOTHING) -> str:
        """The first required field that has no text; "" if there is none."""
        texts = _chains.add_alt_text(given, alt_text) if self.spec.required else NOTHING
        return next((name for name in self.spec.required if not texts.get(name)), "")

    def find_flags(self, text: str, prompt: CaptionPrompt) -> tuple[str, ...]:
        return flags.find_flags(text, self.flags, prompt=f"{self.spec.system}\n{prompt.template}") if text else ()

    def _write_prose(self, value: Mapping[str, Any]) -> str:
        fields = {name: _join_values(value.get(name)) for name in list_fields(self.spec.text)}
        return " ".join(fill_template(self.spec.text, fields).split())


def load(name: str, *, run: Path | None) -> Recipe:
    """The recipe `name` of the run, else of those that ship, which asks one question.

    Raises:
        UnknownNameError: no such recipe exists.
        ConfigError: its file is not a valid recipe, or is a chain of steps.
    """
    return require_single(load_any(name, run=run))


def load_any(name: str, *, run: Path | None) -> Recipe | ChainRecipe:
    """As `load`, also of chains."""
    section = read_toml(name, folder="recipes", run=run)

    def load_flags(own: str) -> flags.Patterns:
        try:
            return flags.load(own, run=run)
        except UnknownNameError as error:
            raise section.error("flags", str(error)) from error

    if section.values.keys() & {"steps", "program"}:
        return _chains.parse_chain(section, load_flags)
    spec = section.parse(RecipeSpec)
    recipe = Recipe(spec=spec, flags=load_flags(spec.flags), examples=read_examples(section, run=run))
    for example in recipe.examples if recipe.answer_format else ():
        if problem := read_answer(Reply(text=example.text), recipe.answer_format).error:
            raise section.error("examples", f"{example.text[:60]!r} is no answer of this recipe's schema: {problem}")
    return recipe


def require_single(recipe: Recipe | ChainRecipe) -> Recipe:
    """
    Raises:
        ConfigError: the recipe is a chain of steps.
    """
    if isinstance(recipe, Recipe):
        return recipe
    part = "steps" if recipe.steps else "program"
    advice = "name a recipe with one prompt, which a model can learn to answer"
    raise ConfigError(f"recipes/{recipe.name}.toml: {part}", f"asks several questions; {advice}")


def load_for_pass(run: Run, caption: str, *, name: str = "") -> tuple[Recipe, GivenTexts]:
    """As `load_any_for_pass`, of a recipe that asks one question.

    Raises:
        ConfigError: it is a chain of steps.
    """
    recipe, given = load_any_for_pass(run, caption, name=name)
    return require_single(recipe), given


def load_any_for_pass(run: Run, caption: str, *, name: str = "") -> tuple[Recipe | ChainRecipe, GivenTexts]:
    """The recipe of a caption pass, or another one by `name`, and what `given` of the pass fills of its prompts.

    Raises:
        UnknownNameError: no such recipe exists.
        ConfigError: `given` is not valid, or leaves a field of the prompt open.
    """
    config = run.sections["caption"][caption]
    recipe = load_any(name or config.recipe, run=run.file.parent)
    steps = [step.name for step in recipe.steps] if isinstance(recipe, ChainRecipe) else []
    open_fields = OpenFields(
        prompt=f"recipe {name or config.recipe!r}",
        fields=recipe.fields,
        optional=frozenset({ALT_TEXT, *recipe.spec.optional}),
        remark=f", which is none of its steps ({', '.join(steps)})" if steps else "",
    )
    field = f"caption.{caption}.given"
    return recipe, fill_fields(run, open_fields, config.given, field=field, caption=caption, partly=bool(name))


def list_flags(run: Run, captions: Iterable[str]) -> set[str]:
    """All flags that captions of these passes can have.

    Raises:
        UnknownNameError: no such recipe exists.
        ConfigError: the file of a recipe is not valid.
    """
    configs = (run.sections["caption"][name] for name in captions)
    made = (load_any(config.recipe, run=run.file.parent) for config in configs if not config.words)
    return {flags.PROMPT_LEAK}.union(*(recipe.flags for recipe in made))


def _join_values(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_join_values, value))
    return "" if value is None else str(value).strip()
