"""Decides what is noticed in an answer without being cut: refusals, leaked prompts, talk about the caption itself.

The words are data: NAME.toml in this folder or in `<run>/flags` gives each flag its regular expressions.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError
from stages.text.repetition import split_words

LEAK = 8  # words in a row that an answer shares with what was asked
Patterns = Mapping[str, tuple[str, ...]]  # flag -> regular expressions, without regard to case

_STRAIGHT = str.maketrans("‘’“”", "''\"\"")


def load(name: str, *, run: Path | None) -> Patterns:
    """The flags called `name`, the run's own before the ones that ship.

    Raises:
        UnknownNameError: there are none of that name.
        ConfigError: they are not TOML, or something in them is no regular expression.
    """
    file = f"flags/{name}.toml"
    try:
        values = tomllib.loads(plugins.words(name, folder="flags", run=run))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, f"is not TOML: {error}") from error
    return {flag: _expressions(f"{file}: {flag}", given) for flag, given in values.items()}


def find_flags(text: str, patterns: Patterns, *, prompt: str = "") -> tuple[str, ...]:
    """The flags that a text has, in the patterns' order.

    Args:
        text: an answer.
        patterns: flag -> regular expressions.
        prompt: what was asked, without the sample's own words; an answer that quotes it has the flag prompt_leak.
    """
    plain = "\n".join(" ".join(line.split()) for line in text.translate(_STRAIGHT).splitlines())
    found = [flag for flag, expressions in patterns.items() if _compiled(expressions).search(plain)]
    if "prompt_leak" not in found and _grams(text) & _grams_of_prompt(prompt):
        found.append("prompt_leak")
    return tuple(found)


def _expressions(where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ConfigError(where, f"{given!r} is not a list of regular expressions")
    for one in given:
        try:
            re.compile(one)
        except re.error as error:
            raise ConfigError(where, f"{one!r} is no regular expression: {error}") from error
    return tuple(given)


@cache
def _compiled(expressions: tuple[str, ...]) -> re.Pattern[str]:
    """All at once; `(?!)`, which matches nothing, stands for an empty list."""
    return re.compile("|".join(f"(?:{one})" for one in expressions) or "(?!)", re.IGNORECASE | re.MULTILINE)


@lru_cache(maxsize=64)
def _grams_of_prompt(prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(_grams(prompt))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + LEAK]) for i in range(len(words) - LEAK + 1)}
