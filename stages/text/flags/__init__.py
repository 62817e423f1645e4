"""Flags of answers: refusals, leaked prompts, talk about the caption itself. Flagged text is kept as it is.

NAME.toml in this directory or in `<run>/flags` gives each flag its regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from pipeline.validation import Section, read_toml
from stages.text.repetition import split_words

LEAK = 8  # words in a row that an answer shares with its prompt
PROMPT_LEAK = "prompt_leak"  # the flag of an answer that does
Patterns = Mapping[str, tuple[str, ...]]  # flag -> regular expressions, case-insensitive

_STRAIGHT_QUOTES = str.maketrans("‘’“”", "''\"\"")


def load(name: str, *, run: Path | None) -> Patterns:
    """The flags `name` of the run, else of those that ship.

    Raises:
        UnknownNameError: no such file exists.
        ConfigError: it is not TOML, or has a value that is not a list of regular expressions.
    """
    section = read_toml(name, folder="flags", run=run)
    return {flag: _parse_expressions(section, flag) for flag in section.values}


def find_flags(text: str, patterns: Patterns, *, prompt: str = "") -> tuple[str, ...]:
    """The flags of an answer, in the order of the patterns.

    Args:
        text: the answer.
        patterns: flag -> regular expressions.
        prompt: the prompt without the sample's alt text; an answer that quotes it has the flag prompt_leak.
    """
    plain = "\n".join(" ".join(line.split()) for line in text.translate(_STRAIGHT_QUOTES).splitlines())
    flags = [flag for flag, expressions in patterns.items() if _compile_all(expressions).search(plain)]
    if PROMPT_LEAK not in flags and _split_grams(text) & _split_prompt(prompt):
        flags.append(PROMPT_LEAK)
    return tuple(flags)


def _parse_expressions(section: Section, flag: str) -> tuple[str, ...]:
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
def _compile_all(expressions: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for all; `(?!)`, which matches nothing, for an empty list."""
    return re.compile("|".join(f"(?:{one})" for one in expressions) or "(?!)", re.IGNORECASE | re.MULTILINE)


@lru_cache(maxsize=64)
def _split_prompt(prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(_split_grams(prompt))


def _split_grams(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + LEAK]) for i in range(len(words) - LEAK + 1)}
