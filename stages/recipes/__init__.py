"""Recipes for captions: the prompt, the format of the answer and the sampling.

Recipes are the TOML files of this directory and of `<run>/recipes`. They know neither engines nor pixels; of a sample
they see the alt text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UnknownNameError
from pipeline.sections import key
from pipeline.validation import read_toml
from stages.text import flags, json_schema
from stages.text.answers import AnswerFormat
from stages.text.prompts import SamplingConfig, check_fields, fence_text, fill_template, hash_prompt, list_fields

FIELDS = ("alt_text",)


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
    prompt: str = key(help="the prompt; {alt_text} is replaced by the sample's alt text, fenced")
    prompt_without_alt_text: str | None = key(None, "the prompt for samples without alt text")
    max_alt_text: int = key(1000, "characters of alt text to show", least=1)
    schema: dict[str, Any] | None = key(None, "JSON Schema of a structured answer, an object")
    text: str = key("", "a template that turns the fields of a structured answer into prose")
    flags: str = key("english", "the flags to look for in answers: a file of flags/")
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self.prompt, FIELDS, where="prompt")
        if "alt_text" in list_fields(self.prompt) and self.prompt_without_alt_text is None:
            raise ValueError("prompt uses {alt_text}: prompt_without_alt_text is needed for samples without one")
        check_fields(self.prompt_without_alt_text or "", (), where="prompt_without_alt_text")
        if self.schema is not None:
            json_schema.check_schema(self.schema)
            check_fields(self.text, self.schema.get("properties", {}), where="text")
        if (self.schema is None) != (not self.text):
            raise ValueError("schema and text need each other: text turns the fields into prose")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with its flags."""

    spec: RecipeSpec
    flags: flags.Patterns

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
        }

    @cached_property
    def schema(self) -> str | None:
        """JSON of the answer's schema, in the order in which fields are to be written."""
        return None if self.spec.schema is None else json.dumps(self.spec.schema, ensure_ascii=False)

    @cached_property
    def answer_format(self) -> AnswerFormat | None:
        return None if self.spec.schema is None else AnswerFormat(schema=self.spec.schema, to_prose=self._write_prose)

    def build_prompt(self, alt_text: str | None) -> CaptionPrompt:
        """The prompt for an image with this alt text."""
        template = self.spec.prompt
        if "alt_text" in list_fields(template) and not (alt_text and alt_text.strip()):
            assert self.spec.prompt_without_alt_text is not None
            template = self.spec.prompt_without_alt_text
        shown = fence_text(alt_text or "", limit=self.spec.max_alt_text)
        return CaptionPrompt(
            prompt=fill_template(template, {"alt_text": shown}).strip(),
            template=template,
            hash=hash_prompt(self.spec.system, template, self.schema or ""),
        )

    def find_flags(self, text: str, prompt: CaptionPrompt) -> tuple[str, ...]:
        return flags.find_flags(text, self.flags, prompt=f"{self.spec.system}\n{prompt.template}") if text else ()

    def _write_prose(self, value: Mapping[str, Any]) -> str:
        fields = {name: _join_values(value.get(name)) for name in list_fields(self.spec.text)}
        return " ".join(fill_template(self.spec.text, fields).split())


def load(name: str, *, run: Path | None) -> Recipe:
    """The recipe `name` of the run, else of those that ship.

    Raises:
        UnknownNameError: no such recipe exists.
        ConfigError: its file is not a valid recipe.
    """
    section = read_toml(name, folder="recipes", run=run)
    spec = section.parse(RecipeSpec)
    try:
        return Recipe(spec=spec, flags=flags.load(spec.flags, run=run))
    except UnknownNameError as error:
        raise section.error("flags", str(error)) from error


def _join_values(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_join_values, value))
    return "" if value is None else str(value).strip()
