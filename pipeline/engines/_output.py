"""Model output as text and numbers: the form that everything a server or a model returns takes before it is a reply.

What cannot be text is an error, which no further attempt would change; text that is not a usable answer has a fault,
which another attempt may not have. It knows neither servers nor what makes an answer good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engines._thoughts import extract_answer
from pipeline.records import replace_surrogates

MAX_CHARACTERS = 2**18  # of an answer: a row group of such texts is still below Arrow's 2 GiB
MAX_TOKENS = 2**31  # larger counts are nonsense, and sums of them leave 64 bits
MAX_REASON = 40  # characters of an unknown reason to stop
ENDS = frozenset({"stop", "stop_sequence", "end", "end_turn", "end_of_text", "complete", "completed"}) | {
    *("eos", "eos_token", "eos_token_id", "eot", "eot_id")
}
NO_REASONS = frozenset({"", "null", "none"})  # written out by servers that have none
CUTS = frozenset({"length", "max_tokens", "max_output_tokens", "max_length", "model_length"})
FILTERS = frozenset({"content_filter", "content_filtered", "safety", "prohibited_content", "recitation", "sensitive"})
TOOLS = frozenset({"tool_calls", "function_call", "tool_use"})
ABORTS = frozenset({"abort", "error", "network_error", "insufficient_system_resource"})  # the server's failure
LOOPS = frozenset({"repetition", "repetition_detected", "repetition_truncation"})
LOOP = "repetition"  # finish_reason of an answer that the engine stopped because it loops
THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_content", "reasoning_text"})
HALF_CHARACTER = "the answer holds half a character, a lone surrogate"
STOPPED_LOOP = "the answer loops: the engine stopped it"
ONLY_THOUGHTS = "the answer is empty: the server returned only the model's thoughts"


class NotTextError(ValueError):
    """The output holds no text."""


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """A token of an answer, and the likeliest tokens at its place.

    The probabilities are the model's own, before temperature and top_p; whether before or after a schema's mask depends
    on the engine.
    """

    text: str
    logprobs: Mapping[str, float]  # text of a token, itself among them -> natural log of its probability


@dataclass(frozen=True, kw_only=True)
class Output:
    """The fields of a reply that come from the model; their meaning is there."""

    text: str
    finish_reason: str | None
    error: str | None
    fault: str
    num_prompt_tokens: int | None
    num_output_tokens: int | None
    tokens: tuple[TokenChoice, ...] | None


def parse_completion(body: bytes) -> Output:
    """Parses the response of a server that speaks OpenAI's protocol.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RecursionError: the response is not a completion.
    """
    completion = json.loads(body)
    choice = completion["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    if isinstance(reason, str) and reason.lower().rpartition(".")[2] in ABORTS:
        raise ValueError(f"finish_reason is {reason}")
    content = message.get("content")
    usage = completion.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    has_thoughts = any(message.get(name) for name in ("reasoning_content", "reasoning"))
    return read_output(
        content=content,
        finish_reason=reason,
        error=_explain_no_answer(message),
        fault=ONLY_THOUGHTS if has_thoughts and not content else "",
        num_prompt_tokens=usage.get("prompt_tokens"),
        num_output_tokens=usage.get("completion_tokens"),
        tokens=choice.get("logprobs"),
    )


def read_output(
    *,
    content: Any,
    finish_reason: Any,
    error: Any = None,
    fault: Any = "",
    num_prompt_tokens: Any = None,
    num_output_tokens: Any = None,
    tokens: Any = None,
) -> Output:
    """Turns whatever an engine has of an answer into text and numbers. Sound text and numbers stay as they are."""
    text = ""
    try:
        text = _read_content(content)
    except NotTextError as not_text:
        error = error or str(not_text)
    except RecursionError:
        error = error or "the answer is not text: its content is nested too deeply"
    if len(text) > MAX_CHARACTERS:
        error = error or f"the answer has {len(text)} characters; at most {MAX_CHARACTERS} can be stored"
        text = text[:MAX_CHARACTERS]
    whole = replace_surrogates(text)
    if whole.count("\ufffd") > text.count("\ufffd"):
        fault = fault or HALF_CHARACTER
    if not error:
        whole, thoughts = extract_answer(whole)
        fault = fault or thoughts
    reason, reason_error, reason_fault = _read_reason(finish_reason, has_text=bool(text))
    error = error or reason_error
    return Output(
        text=whole,
        finish_reason=reason,
        error=replace_surrogates(str(error)) if error else None,
        fault=replace_surrogates(str(fault)) if fault else reason_fault,
        num_prompt_tokens=_read_count(num_prompt_tokens),
        num_output_tokens=_read_count(num_output_tokens),
        tokens=_read_tokens(tokens),
    )


def _explain_no_answer(message: Mapping[str, Any]) -> str | None:
    if refusal := message.get("refusal"):
        return f"the model refused: {refusal}"
    if not message.get("content") and (message.get("tool_calls") or message.get("function_call")):
        return "the model called a tool instead of answering (tool_calls)"
    return None


def _read_content(content: Any) -> str:
    """
    Raises:
        NotTextError: the content, or a part of it, is neither text nor a thought.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return _read_part(content)
    if isinstance(content, list):
        return "".join(_read_part(part) for part in content)
    raise NotTextError(f"the answer is not text: its content is of type {type(content).__name__}")


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        if isinstance(part.get("type"), str) and part["type"] in THOUGHT_PARTS:
            return ""
        if part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "refusal":
            raise NotTextError(f"the model refused: {part.get('refusal')}")
    raise NotTextError("the answer is not text: a part of its content is something else")


def _read_reason(reason: Any, *, has_text: bool) -> tuple[str | None, str | None, str]:
    """The reason to stop as "stop", "length", "repetition" or what it is; an error or a fault if it is not an end."""
    if reason is None or (isinstance(reason, str) and reason.strip().lower() in NO_REASONS):
        return ("stop" if has_text else None), None, ""
    if not isinstance(reason, str):
        return None, f"finish_reason is of type {type(reason).__name__}, not a text", ""
    name = reason.strip().lower().rpartition(".")[2]  # of FinishReason.STOP, as enumerations are written
    if name in ENDS:
        return "stop", None, ""
    if name in CUTS:
        return "length", None, ""
    if name in LOOPS:
        return LOOP, None, STOPPED_LOOP
    name = replace_surrogates(" ".join(name.split())[:MAX_REASON])
    if name in FILTERS:
        return name, f"the server's content filter stopped the answer ({name})", ""
    if name == "refusal":
        return name, "the model refused (refusal)", ""
    if name in TOOLS:
        return name, f"the model called a tool instead of answering ({name})", ""
    return name, None, f"the answer ended for an unknown reason: {name!r}"


def _read_count(count: Any) -> int | None:
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    is_count = isinstance(count, int) and not isinstance(count, bool) and 0 <= count < MAX_TOKENS
    return count if is_count else None


def build_choice(text: str, alternatives: Iterable[tuple[str, float]]) -> TokenChoice:
    """A token and its alternatives; those that read the same are one, and impossible ones are left out."""
    logprobs: dict[str, float] = {}
    for alternative, logprob in alternatives:
        if math.isfinite(logprob):
            known = logprobs.get(alternative, -math.inf)
            high, low = max(known, logprob), min(known, logprob)
            logprobs[alternative] = high + math.log1p(math.exp(low - high))
    return TokenChoice(text=text, logprobs=logprobs)


def _read_tokens(tokens: Any) -> tuple[TokenChoice, ...] | None:
    """Reads token choices, or OpenAI's object of them. What has another form is None."""
    listed = tokens.get("content") if isinstance(tokens, dict) else tokens
    if not isinstance(listed, list | tuple):
        return None
    try:
        return tuple(token if isinstance(token, TokenChoice) else _read_token(token) for token in listed)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _read_token(token: Mapping[str, Any]) -> TokenChoice:
    """
    Raises:
        LookupError, TypeError, ValueError, AttributeError, OverflowError: it is not OpenAI's object of a token.
    """
    text = str.__str__(token["token"])
    others = {str.__str__(one["token"]): float(one["logprob"]) for one in token.get("top_logprobs") or ()}
    return build_choice(text, {**others, text: float(token["logprob"])}.items())
