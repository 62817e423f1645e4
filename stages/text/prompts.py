"""Building blocks of a request: prompt templates, quoted text of unknown origin, sampling settings and seeds.

Knows no recipe, no rubric and no table.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pipeline import plugins
from pipeline.engines import Sampling
from pipeline.errors import ConfigError
from pipeline.sections import Run, key

T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")
FIELD = re.compile(r"\{([a-z_]+)\}")
JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji need them
MAX_TEXTS = 64  # of one field that a prompt shows
NO_TEXT = "(none)"  # in a prompt, for a field without a text
MAX_ATTEMPTS = 64  # each attempt adds 1 to the seed, so this many seeds are reserved


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """`[sampling]` of a recipe or rubric."""

    temperature: float = key(0.0, "of the first attempt; 0 is greedy", least=0, most=2)
    top_p: float = key(1.0, "sample from the likeliest tokens that hold this much of the probability", least=0, most=1)
    top_k: int = key(0, "sample from this many of the likeliest tokens; 0: from all", least=0)
    repetition_penalty: float = key(1.0, "above 1, tokens that were used become less likely", least=0.1, most=10)
    max_tokens: int = key(512, "a longer answer is cut, and the request is retried", least=1)
    ladder: tuple[float, ...] = key((), "temperatures of the second and later attempts")

    def __post_init__(self) -> None:
        if self.top_p == 0:
            raise ValueError("top_p = 0 leaves no token to sample; it must be above 0, and 1 turns it off")
        if len(self.ladder) >= MAX_ATTEMPTS or any(not 0 <= step <= 2 for step in self.ladder):
            raise ValueError(f"ladder must have fewer than {MAX_ATTEMPTS} temperatures, each from 0 to 2")

    @property
    def rungs(self) -> tuple[Sampling, ...]:
        """The sampling of each attempt, in order."""
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
    """Fills the {fields} of a template in one pass, so that braces in a value have no effect.

    >>> fill_template("{a} and {b}", {"a": "{b}", "b": "c"})
    '{b} and c'
    """
    return FIELD.sub(lambda match: fields[match[1]], template)


def list_fields(template: str) -> list[str]:
    """The names of the template's fields, in order of appearance."""
    return FIELD.findall(template)


def check_fields(template: str, allowed: Iterable[str], *, where: str) -> None:
    """
    Raises:
        ValueError: the template has a field that is not allowed.
    """
    if unknown := set(list_fields(template)) - set(allowed):
        known = ", ".join(f"{{{name}}}" for name in allowed)
        raise ValueError(f"{where}: {{{min(unknown)}}} is not a field; the fields are {known}")


def fence_text(text: str, *, limit: int | None = None) -> str:
    """The sanitised text on lines of its own, between fences longer than any run of backticks in it.

    Args:
        text: text of unknown origin.
        limit: the most characters to keep.
    """
    text = truncate_text(sanitise_text(text), limit)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def fence_texts(texts: Sequence[str], *, limit: int) -> str:
    """One text as `fence_text` has it, several as a numbered list, each in a fence of its own.

    Args:
        texts: of unknown origin; the first MAX_TEXTS are shown.
        limit: the most characters of all together; the longest texts are cut to the same length.
    """
    shown = [sanitise_text(text) for text in texts[:MAX_TEXTS]]
    most = _share_limit([len(text) for text in shown], limit)
    fenced = [fence_text(text, limit=most) for text in shown]
    if len(fenced) < 2:
        return "".join(fenced) or NO_TEXT
    return "\n\n".join(f"{number}.\n{text}" for number, text in enumerate(fenced, start=1))


def _share_limit(lengths: Sequence[int], limit: int) -> int:
    """The most characters of each text, where short ones leave room for longer ones."""
    left = limit
    for place, length in enumerate(sorted(lengths)):
        num = len(lengths) - place
        if length * num > left:
            return max(1, left // num)
        left -= length
    return limit


def sanitise_text(text: str) -> str:
    """Replaces control characters and breaks up the special tokens of chat templates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    plain = text
    if not text.replace("\n", " ").isprintable():
        plain = "".join(c if c in "\n" or c in JOINERS or unicodedata.category(c)[0] != "C" else " " for c in text)
    return re.sub(r"<(?=[|/\w])|\[(?=/?INST\])", lambda match: f"{match[0]} ", plain).strip()


def join_lines(text: str) -> str:
    """The sanitised text on one line."""
    return " ".join(sanitise_text(text).split())


def truncate_text(text: str, limit: int | None) -> str:
    """At most `limit` characters, cut between words where possible, with an ellipsis if anything was cut."""
    if limit is None or len(text) <= limit:
        return text
    head = text[:limit]
    return f"{head.rsplit(maxsplit=1)[0] if ' ' in head[limit // 2 :] else head} …"


def derive_seed(*parts: str | int) -> int:
    """A 31-bit seed that depends on every part, with room above it for the seeds of later attempts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8]) % (2**31 - MAX_ATTEMPTS)


@lru_cache(maxsize=256)
def encode_sampling(sampling: Sampling) -> str:
    """The JSON in a caption table; cached, since nearly all rows share it."""
    return json.dumps(asdict(sampling))


@lru_cache(maxsize=256)
def hash_prompt(*texts: str) -> str:
    """16 hex digits that identify the fixed texts of a prompt."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def map_with_context(
    function: Callable[[Iterator[In]], Iterator[Out]], pairs: Iterable[tuple[T, In]]
) -> Iterator[tuple[T, Out]]:
    """Maps the second items of pairs lazily, and pairs each result with the first item.

    Args:
        function: gives one result per input, in order.
        pairs: (context, input).
    """
    contexts: deque[T] = deque()

    def inputs() -> Iterator[In]:
        for context, value in pairs:
            contexts.append(context)
            yield value

    for result in function(inputs()):
        yield contexts.popleft(), result


def map_where(
    function: Callable[[Iterator[T]], Iterator[Out]], items: Iterable[T], condition: Callable[[T], bool]
) -> Iterator[tuple[T, Out | None]]:
    """Maps only the items that meet a condition; gives every item, in order, with its result or None.

    Args:
        function: gives one result per input, in order.
        items: all items.
        condition: a pure function; it is called several times per item.
    """
    pending: deque[T] = deque()

    def inputs() -> Iterator[T]:
        for item in items:
            pending.append(item)
            if condition(item):
                yield item

    for result in function(inputs()):
        while not condition(pending[0]):
            yield pending.popleft(), None
        yield pending.popleft(), result
    yield from ((item, None) for item in pending)


def engine_slice(run: Run, name: str, *, field: str) -> dict[str, Any]:
    """The part of a fingerprint that an engine of run.toml adds; the program that serves the model is left out.

    Raises:
        ConfigError: `field` names an engine that run.toml does not have.
    """
    if name not in run.engines:
        raise ConfigError(f"{run.file}: {field}", plugins.explain_unknown(name, sorted(run.engines)))
    return {part: value for part, value in run.engines[name].stamp.items() if part != "kind"}
