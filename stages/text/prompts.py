"""Decides how a model is asked: how foreign words enter a prompt, how tokens are drawn, with which seed.

It knows no recipe, no rubric and no table.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pipeline import plugins
from pipeline.engines import Sampling
from pipeline.errors import ConfigError
from pipeline.sections import Run, key

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")
FIELD = re.compile(r"\{([a-z_]+)\}")
JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji are spelt with them
MAX_ATTEMPTS = 64  # seeds above a request's own, one for each further attempt


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn: `[sampling]` of a recipe or rubric."""

    temperature: float = key(0.0, "of the first attempt; 0 is greedy", least=0, most=2)
    top_p: float = key(1.0, "draw from the likeliest tokens that have this much of the probability", least=0, most=1)
    top_k: int = key(0, "draw from this many of the likeliest tokens; 0: from all", least=0)
    repetition_penalty: float = key(1.0, "above 1: tokens that were used become less likely", least=0.1, most=10)
    max_tokens: int = key(512, "an answer that is longer is cut, and asked for again", least=1)
    ladder: tuple[float, ...] = key((), "temperatures of the attempts after the first")

    def __post_init__(self) -> None:
        if self.top_p == 0:
            raise ValueError("top_p = 0 leaves no token to draw; it is above 0, and 1 is off")
        if len(self.ladder) >= MAX_ATTEMPTS or any(not 0 <= step <= 2 for step in self.ladder):
            raise ValueError(f"ladder has fewer than {MAX_ATTEMPTS} temperatures, each from 0 to 2")

    @property
    def rungs(self) -> tuple[Sampling, ...]:
        """One for each attempt, the first first."""
        return tuple(
            Sampling(
                temperature=temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                max_tokens=self.max_tokens,
            )
            for temperature in (self.temperature, *self.ladder)
        )


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """The template with its {fields} filled in one pass: what is filled in is not looked at again.

    >>> fill_template("{a} and {b}", {"a": "{b}", "b": "c"})
    '{b} and c'
    """
    return FIELD.sub(lambda found: fields[found[1]], template)


def list_fields(template: str) -> list[str]:
    """The names of its fields, in the order in which they stand."""
    return FIELD.findall(template)


def check_fields(template: str, allowed: Iterable[str], *, where: str) -> None:
    """
    Raises:
        ValueError: the template has a field that nothing fills.
    """
    if unknown := set(list_fields(template)) - set(allowed):
        known = ", ".join(f"{{{name}}}" for name in allowed)
        raise ValueError(f"{where}: {{{min(unknown)}}} is no field; there are {known}")


def fence_text(text: str, *, limit: int | None = None) -> str:
    """The text on lines of its own, between fences longer than any run of backticks in it.

    Args:
        text: words of unknown origin.
        limit: characters kept.
    """
    text = truncate_text(sanitise_text(text), limit)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def sanitise_text(text: str) -> str:
    """The text without what would steer a tokenizer or a terminal: control characters and a chat template's tokens."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    plain = "".join(c if c in "\n" or c in JOINERS or unicodedata.category(c)[0] != "C" else " " for c in text)
    return re.sub(r"<(?=[|/\w])|\[(?=/?INST\])", lambda found: f"{found[0]} ", plain).strip()


def join_lines(text: str) -> str:
    return " ".join(sanitise_text(text).split())


def truncate_text(text: str, limit: int | None) -> str:
    """At most `limit` characters, whole words where there are words, with a mark where something is missing."""
    if limit is None or len(text) <= limit:
        return text
    head = text[:limit]
    return f"{head.rsplit(maxsplit=1)[0] if ' ' in head[limit // 2 :] else head} …"


def derive_seed(*parts: str | int) -> int:
    """31 bits that depend on every part and leave room for the seeds of further attempts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8]) % (2**31 - MAX_ATTEMPTS)


@lru_cache(maxsize=256)
def encode_sampling(sampling: Sampling) -> str:
    """As the tables of captions have it; nearly every row has the same."""
    return json.dumps(asdict(sampling))


@lru_cache(maxsize=256)
def hash_prompt(*words: str) -> str:
    """Of the words asked, 16 hex digits."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def map_with_context(
    work: Callable[[Iterator[Q]], Iterator[A]], questions: Iterable[tuple[T, Q]]
) -> Iterator[tuple[T, A]]:
    """Hands questions to `work`, which answers them lazily and in order; gives each answer with what it is about."""
    asked: deque[T] = deque()

    def handed() -> Iterator[Q]:
        for about, question in questions:
            asked.append(about)
            yield question

    for answer in work(handed()):
        yield asked.popleft(), answer


def map_where(
    work: Callable[[Iterator[T]], Iterator[A]], items: Iterable[T], is_asked: Callable[[T], bool]
) -> Iterator[tuple[T, A | None]]:
    """Hands to `work` only those items about which it is to be asked; gives every item, in order, with its answer."""
    waiting: deque[T] = deque()

    def handed() -> Iterator[T]:
        for item in items:
            waiting.append(item)
            if is_asked(item):
                yield item

    for answer in work(handed()):
        while not is_asked(waiting[0]):
            yield waiting.popleft(), None
        yield waiting.popleft(), answer
    yield from ((item, None) for item in waiting)


def engine_slice(run: Run, name: str, *, field: str) -> dict[str, Any]:
    """What an engine of run.toml decides of its answers; which program serves the model decides nothing.

    Raises:
        ConfigError: `field` names an engine that run.toml does not have.
    """
    if name not in run.engines:
        raise ConfigError(f"{run.file}: {field}", plugins.explain_unknown(name, sorted(run.engines)))
    return {part: value for part, value in run.engines[name].stamp.items() if part != "kind"}
