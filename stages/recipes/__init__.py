"""Decides what a recipe is: the words that ask for a caption, the form of the answer, and how its tokens are drawn.

The recipes are the TOML files of this folder and of `<run>/recipes`. A recipe knows no engine and no image but the alt
text that came with one.
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
from stages import flags
from stages.text import json_schema
from stages.text.answers import AnswerFormat
from stages.text.prompts import SamplingConfig, check_fields, fence_text, fill_template, hash_prompt, list_fields

FIELDS = ("alt_text",)


@dataclass(frozen=True, kw_only=True)
class CaptionPrompt:
    """What one request says, and the hash of the words that are the same for every image."""

    prompt: str
    template: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class RecipeSpec:
    """A recipe's TOML."""

    system: str = key("", "the system message; empty: none")
    prompt: str = key(help="what is asked; {alt_text} stands for the sample's alt text, fenced")
    prompt_without_alt_text: str | None = key(None, "what is asked where a sample has no alt text")
    max_alt_text: int = key(1000, "characters of alt text that are shown", least=1)
    schema: dict[str, Any] | None = key(None, "JSON schema of a structured answer, an object")
    text: str = key("", "how the fields of a structured answer make prose")
    flags: str = key("english", "what is noticed in answers: a file of flags/")
    sampling: SamplingConfig = key(factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self.prompt, FIELDS, where="prompt")
        if "alt_text" in list_fields(self.prompt) and self.prompt_without_alt_text is None:
            raise ValueError("prompt uses {alt_text}: prompt_without_alt_text must say what to ask where there is none")
        check_fields(self.prompt_without_alt_text or "", (), where="prompt_without_alt_text")
        if self.schema is not None:
            json_schema.check_schema(self.schema)
            check_fields(self.text, self.schema.get("properties", {}), where="text")
        if (self.schema is None) != (not self.text):
            raise ValueError("schema and text belong together: text says how the fields make prose")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, ready to ask."""

    spec: RecipeSpec
    flags: flags.Patterns

    @property
    def slice(self) -> dict[str, Any]:
        """All that it decides of a caption but the sampling, as JSON values; the schema's order of fields counts."""
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
        return None if self.spec.schema is None else json.dumps(self.spec.schema, ensure_ascii=False)

    @cached_property
    def answer_format(self) -> AnswerFormat | None:
        return None if self.spec.schema is None else AnswerFormat(schema=self.spec.schema, to_prose=self._prose)

    def build_prompt(self, alt_text: str | None) -> CaptionPrompt:
        """What to ask about an image with this alt text."""
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

    def find_flags(self, text: str, asked: CaptionPrompt) -> tuple[str, ...]:
        return flags.find_flags(text, self.flags, prompt=f"{self.spec.system}\n{asked.template}") if text else ()

    def _prose(self, value: Mapping[str, Any]) -> str:
        said = {name: _said(value.get(name)) for name in list_fields(self.spec.text)}
        return " ".join(fill_template(self.spec.text, said).split())


def load(name: str, *, run: Path | None) -> Recipe:
    """The recipe called `name`, the run's own before the ones that ship.

    Raises:
        UnknownNameError: there is no such recipe.
        ConfigError: something in it is wrong.
    """
    section = read_toml(name, folder="recipes", run=run)
    spec = section.parse(RecipeSpec)
    try:
        return Recipe(spec=spec, flags=flags.load(spec.flags, run=run))
    except UnknownNameError as error:
        raise section.error("flags", str(error)) from error


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return "" if value is None else str(value).strip()
