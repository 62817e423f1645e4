"""The engine protocol: one method, `generate`, from requests to as many replies, in order.

The folder is the registry: one engine per file, named by `engines.NAME.kind`. An engine is a module with two names:
`Config`, a frozen dataclass of its keys in `[engines.NAME]`, declared with `pipeline.sections.key`; and
`open(config) -> Engine`, which loads the model. A third, `inspect(config) -> Inspection`, is for `recap check`: it
loads nothing, and raises ConfigError where `open` would fail, or EngineDiedError where a server does not answer. An
engine passes every attempt through `finish_attempt`, so that sampling ladders have one meaning, and every reply holds
text and numbers that a table can hold.

An engine knows nothing of images' origins, captions or rubrics. A request that cannot be answered is a reply with an
error; an engine that cannot answer at all raises `EngineDiedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from pipeline.decoding.images import Region
from pipeline.engines import _output

LOOP = _output.LOOP
TokenChoice = _output.TokenChoice
MAX_TOP_TOKENS = 20  # what servers allow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters. Always sent in full, because checkpoints ship different defaults."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: off
    repetition_penalty: float = 1.0
    max_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The response to one request."""

    text: str = ""
    finish_reason: str | None = None  # "stop", "length", "repetition"; None when nothing was generated
    error: str | None = None  # why there is no answer
    fault: str = ""  # why the text is not a usable answer, to any prompt; "": it may be one
    problem: str = ""  # what `accept` returned for the last attempt; "" when it was accepted
    attempt: int = 0  # from 1; 0 when nothing was generated
    sampling: Sampling = field(default_factory=Sampling)  # of that attempt
    seed: int = 0  # of that attempt
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None  # of the last attempt
    tokens: tuple[TokenChoice, ...] | None = None  # of the answer, when requested and known


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An engine as it can be known before it is opened."""

    summary: str  # for people
    takes_images: bool | None = None  # None: unknown
    context: int | None = None  # tokens of prompt and answer together; None: unknown


def accept_all(_: Reply) -> str:
    return ""


def find_no_loop(_: str) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt. Images precede the text, so that requests about one image share a prefix."""

    id: str  # for messages
    prompt: str
    system: str = ""
    images: tuple[bytes | Region, ...] = ()  # unchanged files, or parts: the engine decodes what the model will see
    examples: tuple[tuple[str, str], ...] = ()  # earlier prompts and answers, each about one of the first images
    source_key: str = ""  # the sample's name in the corpus
    schema: str | None = None  # a JSON schema that the answer must follow, as text
    ladder: tuple[Sampling, ...] = (Sampling(),)  # tried in turn until `accept` returns ""
    accept: Callable[[Reply], str] = accept_all  # returns "", or what is wrong with the answer
    find_loop: Callable[[str], str] = find_no_loop  # returns "", or a loop in a text that no continuation can mend
    seed: int = 0  # attempt n uses seed + n - 1
    top_tokens: int = 0  # alternatives to report at each token, at most MAX_TOP_TOKENS; 0: report no tokens


@runtime_checkable
class Engine(Protocol):
    """A model that answers requests. `generate` may be called from several threads; they share one budget.

    An engine that waits for servers has `heed(stop: threading.Event)` too: once the event is set, it finishes what is
    in flight and waits no longer for a server that is gone.
    """

    model: str
    revision: str

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yields as many replies as requests, in order. Draws requests lazily, only as the engine has room.

        Every request that was drawn is answered without waiting for the next one, which may depend on its answer.

        Raises:
            EngineDiedError: the engine cannot answer any more requests.
        """
        ...

    def waiting(self) -> float | None:
        """Returns the mean share of the engine, [0, 1], that was idle for lack of input since the previous call."""
        ...

    def close(self) -> None:
        """Frees memory and ends processes. Idempotent."""
        ...


def build_messages(request: Request, images: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a request as chat messages, images before text, so that prompts about one image share a prefix.

    Args:
        request: the request.
        images: for each of its images the part of a message that shows it.
    """
    parts = list(images)
    messages: list[dict[str, Any]] = [{"role": "system", "content": request.system}] if request.system else []
    for number, (prompt, answer) in enumerate(request.examples):
        messages.append({"role": "user", "content": [parts[number], {"type": "text", "text": prompt}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    shown = parts[len(request.examples) :]
    return [*messages, {"role": "user", "content": [*shown, {"type": "text", "text": request.prompt}]}]


def finish_attempt(request: Request, reply: Reply, attempt: int) -> tuple[Reply, bool]:
    """Returns an attempt's reply with the verdict of `accept`, and whether it is final.

    Every engine calls this once per attempt, counted from 1. An answer is final when it was accepted, failed as a
    request, or came from the ladder's last rung.
    """
    reply = clean_reply(reply)
    reply = replace(reply, attempt=attempt, sampling=request.ladder[attempt - 1], seed=request.seed + attempt - 1)
    if reply.error is not None:
        return reply, True
    problem = request.accept(reply) or reply.fault
    return replace(reply, problem=problem), not problem or attempt == len(request.ladder)


def is_wanted_stop(request: Request, reply: Reply) -> bool:
    """Tests whether an answer may end where it does: the engine has not stopped it, or it loops for the request too."""
    if reply.finish_reason != LOOP:
        return True
    cleaned = clean_reply(reply)
    return cleaned.fault == _output.STOPPED_LOOP and bool(request.find_loop(cleaned.text))


def clean_reply(reply: Reply) -> Reply:
    """Returns the reply with text and numbers in every field; sound ones are unchanged."""
    output = _output.read_output(
        content=reply.text,
        finish_reason=reply.finish_reason,
        error=reply.error,
        fault=reply.fault,
        num_prompt_tokens=reply.num_prompt_tokens,
        num_output_tokens=reply.num_output_tokens,
        tokens=reply.tokens,
    )
    return replace(reply, **vars(output))
