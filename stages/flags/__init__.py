"""Decides what is noticed in an answer without being cut: refusals, leaked prompts, talk about the caption itself.

The words are data: NAME.toml in this folder or in `<run>/flags` gives each flag its regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from pipeline.validation import Section, read_toml
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
    section = read_toml(name, folder="flags", run=run)
    return {flag: _expressions(section, flag) for flag in section.values}


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


def _expressions(section: Section, flag: str) -> tuple[str, ...]:
    expressions = section.values[flag]
    if not isinstance(expressions, list) or not all(isinstance(one, str) for one in expressions):
        raise section.error(flag, f"{expressions!r} is not a list of regular expressions")
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise section.error(flag, f"{expression!r} is not a regular expression: {error}") from error
    return tuple(expressions)


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
