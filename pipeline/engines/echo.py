"""The echo engine: answers without a model, text or an instance of the schema, drawn from the request's hash.

It looks at no pixels and knows no chat template. Failures are drawn from the hash too, so that retries can be tested.
The same request always gets the same reply.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pipeline.decoding.images import Region
from pipeline.engines import Reply, Request, Sampling, TokenChoice, finish_attempt
from pipeline.errors import EngineDiedError
from pipeline.sections import key

_ADJECTIVES = (
    "amber ancient bright broken calm carved coarse dark distant dusty faded gentle glossy green grey hollow low narrow"
    " pale polished quiet red round rough rusty shallow sharp slender small smooth soft striped tall thin violet warm"
    " weathered white wide wooden yellow"
)
_NOUNS = (
    "anchor arch barrel basket bench bicycle boat bottle bridge candle chair cliff clock cup door drum fence field"
    " flag flower fountain gate harbour hat hill house kettle ladder lamp lantern meadow mirror mountain path pier"
    " pillow river road rock roof shelf shore staircase table tower tree umbrella vase wall wheel window"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
PLACES = ("above", "behind", "below", "beside", "in front of", "near", "next to", "to the left of", "to the right of")
WORDS_PER_SENTENCE = 12  # at most


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[engines.NAME]` with kind = "echo"."""

    text: str | None = key(None, "a fixed answer, instead of text drawn from the request")
    error_share: float = key(0.0, "share of attempts that fail as bad requests", least=0, most=1, shown=False)
    empty_share: float = key(0.0, "share of attempts with an empty answer", least=0, most=1, shown=False)
    truncated_share: float = key(0.0, "share of attempts with a truncated answer", least=0, most=1, shown=False)
    repeated_share: float = key(0.0, "share of attempts with a repetitive answer", least=0, most=1, shown=False)
    invalid_share: float = key(0.0, "share of attempts at a schema with invalid JSON", least=0, most=1, shown=False)
    delay: float = key(0.0, "seconds per attempt", stamp=False, least=0, shown=False)
    die_after: int = key(0, "attempts after which the engine dies; 0: never", stamp=False, least=0, shown=False)

    def __post_init__(self) -> None:
        if sum(self.shares.values()) > 1:
            raise ValueError(f"the shares of failures add up to {sum(self.shares.values()):g}; the maximum is 1")

    @property
    def shares(self) -> Mapping[str, float]:
        return {
            "error": self.error_share,
            "empty": self.empty_share,
            "truncated": self.truncated_share,
            "repeated": self.repeated_share,
            "invalid": self.invalid_share,
        }


def open(config: Config) -> Echo:
    return Echo(config)


class Echo:
    """Answers one request at a time, when its reply is taken: no request is drawn ahead."""

    model = "echo"
    revision = "1"  # of the answers drawn from a hash

    def __init__(self, config: Config) -> None:
        self._config = config
        self._num_attempts = 0
        self._lock = threading.Lock()

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            yield self._answer(request)

    def waiting(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Reply:
        digest = _hash_request(request)
        attempt, is_final = 0, False
        while not is_final:
            attempt += 1
            self._count_attempt()
            draw = f"{digest}{request.seed + attempt - 1}"
            reply, is_final = finish_attempt(
                request, self._make_attempt(request, request.ladder[attempt - 1], draw), attempt
            )
        return reply

    def _count_attempt(self) -> None:
        if self._config.delay:
            time.sleep(self._config.delay)
        with self._lock:
            self._num_attempts += 1
            if 0 < self._config.die_after < self._num_attempts:
                raise EngineDiedError(f"the echo engine dies after {self._config.die_after} attempts (die_after)")

    def _make_attempt(self, request: Request, sampling: Sampling, draw: str) -> Reply:
        if any(not _read_bytes(image) for image in request.images):
            return Reply(error="an image has no bytes")
        try:
            text = self._write_text(request, sampling, Random(draw))
        except ValueError as error:
            return Reply(error=f"the schema is not supported: {error}")
        return _apply_failure(self._choose_failure(draw), text, request, Random(draw))

    def _write_text(self, request: Request, sampling: Sampling, random: Random) -> str:
        if self._config.text is not None:
            return self._config.text
        if request.schema is not None:
            schema = json.loads(request.schema)
            return json.dumps(make_instance(schema, random, root=schema), ensure_ascii=False)
        most = max(1, sampling.max_tokens // WORDS_PER_SENTENCE)
        return " ".join(_write_sentence(random) for _ in range(min(most, random.randint(2, 5))))

    def _choose_failure(self, draw: str) -> str:
        point = Random(f"failure {draw}").random()
        for failure, share in self._config.shares.items():
            if point < share:
                return failure
            point -= share
        return ""


def _hash_request(request: Request) -> str:
    """Returns a hash of everything in the request except the seed, as hex."""
    texts = (request.system, request.prompt, request.schema, *request.examples)
    digest = hashlib.sha256(repr(texts).encode())
    for image in request.images:
        digest.update(hashlib.sha256(_read_bytes(image)).digest())
        if isinstance(image, Region):
            digest.update(repr(image.box).encode())
    return digest.hexdigest()


def _read_bytes(image: bytes | Region) -> bytes:
    return image.data if isinstance(image, Region) else image


def _apply_failure(failure: str, text: str, request: Request, random: Random) -> Reply:
    """Returns a reply with `text`, spoiled by the chosen failure."""
    words = text.split()
    if failure == "error":
        return Reply(error="failed by error_share")
    if failure == "empty":
        text = ""
    elif failure == "truncated":
        text = " ".join(words[: len(words) // 2])
    elif failure == "repeated":
        text = " ".join([*words, *(words[-4:] * 16)])
    elif failure == "invalid" and request.schema is not None:
        text = text[:-1]
    tokens = text.split()
    return Reply(
        text=text,
        finish_reason="length" if failure == "truncated" else "stop",
        num_prompt_tokens=len(request.prompt.split()) + len(request.images),
        num_output_tokens=len(tokens),
        tokens=tuple(TokenChoice(text=token, logprobs={token: -random.expovariate(2)}) for token in tokens)
        if request.top_tokens
        else None,
    )


def _write_sentence(random: Random) -> str:
    first, second = random.sample(NOUNS, 2)
    before, after = random.sample(ADJECTIVES, 2)
    article, other = ("an" if word[0] in "aeiou" else "a" for word in (before, after))
    return f"{article.capitalize()} {before} {first} stands {random.choice(PLACES)} {other} {after} {second}."


def make_instance(schema: Any, random: Random, *, root: Any) -> Any:
    """Draws a value that satisfies a JSON schema.

    Raises:
        ValueError: the schema uses a feature that is not supported here.
    """
    if schema is True or schema == {}:
        return _write_sentence(random)
    if not isinstance(schema, dict):
        raise ValueError(f"{schema!r} is not a schema")
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return random.choice(schema["enum"])
    if "$ref" in schema:
        return make_instance(_resolve(schema["$ref"], root), random, root=root)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return make_instance(random.choice(schema[choice]), random, root=root)
    return _make_typed(schema, random, root)


def _make_typed(schema: dict[str, Any], random: Random, root: Any) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = random.choice(kind)
    if kind == "object":
        return {name: make_instance(part, random, root=root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return _make_array(schema, random, root)
    if kind == "string":
        return _make_string(schema, random)
    if kind in ("integer", "number"):
        return _make_number(schema, random, whole=kind == "integer")
    if kind in ("boolean", "null"):
        return random.choice((True, False)) if kind == "boolean" else None
    raise ValueError(f"unknown type {kind!r}")


def _make_array(schema: dict[str, Any], random: Random, root: Any) -> list[Any]:
    first = schema.get("prefixItems", [])
    least = max(len(first), schema.get("minItems", 1))
    size = random.randint(least, schema.get("maxItems", least + 2)) if schema.get("items", {}) is not False else least
    parts = [*first, *[schema.get("items", {})] * (size - len(first))]
    return [make_instance(part, random, root=root) for part in parts]


def _make_string(schema: dict[str, Any], random: Random) -> str:
    if "pattern" in schema or "format" in schema:
        raise ValueError("string patterns and formats are not supported")
    text = _write_sentence(random)
    while len(text) < schema.get("minLength", 0):
        text = f"{text} {_write_sentence(random)}"
    return text[: schema.get("maxLength", len(text))]


def _make_number(schema: dict[str, Any], random: Random, *, whole: bool) -> int | float:
    step = 1 if whole else 0.001
    least = schema.get("minimum", schema["exclusiveMinimum"] + step if "exclusiveMinimum" in schema else 0)
    most = schema.get("maximum", schema["exclusiveMaximum"] - step if "exclusiveMaximum" in schema else least + 10)
    if whole:
        return random.randint(math.ceil(least), math.floor(most))
    number: float = min(max(round(random.uniform(least, most), 3), least), most)
    return number


def _resolve(reference: str, root: Any) -> Any:
    node = root
    for part in reference.removeprefix("#/").split("/"):
        if not isinstance(node, dict) or part not in node:
            raise ValueError(f"{reference!r} is not in the schema")
        node = node[part]
    return node
