"""Answers of models: which ones are accepted, and why the others are rejected.

Sees one reply at a time and knows neither the image nor the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engines import LOOP, Reply
from pipeline.records import CaptionStatus
from stages.text import json_schema
from stages.text.repetition import find_loop


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A parsed answer. Unless its status is "ok", `text` is the raw reply.

    `error` names the general problem and, after a colon, the detail of this answer, so that errors can be counted.
    """

    text: str
    fields: str | None  # the JSON of a structured answer
    status: CaptionStatus
    error: str | None


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The format of a structured answer."""

    schema: Mapping[str, Any]
    to_prose: Callable[[Any], str]  # from a value that follows the schema


def read_answer(reply: Reply, answer_format: AnswerFormat | None = None) -> Answer:
    """Parses a reply.

    It is accepted when it finished with "stop", is not empty, does not loop and, with a format, follows it. A loop that
    ran into the token limit counts as a loop, since more tokens would not help.
    """
    raw = reply.text.strip()
    if reply.error is not None:
        return _reject("error", raw, reply.error)
    if not raw:
        return _reject("empty", raw, reply.fault or "the answer is empty")
    text, fields, problem = _parse_structured(raw, answer_format) if answer_format else (raw, None, "")
    loop, is_stopped = find_loop(text), reply.finish_reason == LOOP
    if loop or is_stopped:
        by_engine = "the engine stopped it" if is_stopped else ""
        return _reject("repeated", raw, f"the answer loops: {'; '.join(filter(None, (loop, by_engine)))}")
    if reply.finish_reason == "length" or (reply.finish_reason != "stop" and not reply.fault):
        return _reject("truncated", raw, reply.fault or _explain_truncation(reply))
    if problem := reply.fault or problem:
        return _reject("invalid", raw, problem)
    return Answer(text=text, fields=fields, status="ok", error=None)


def read_value(reply: Reply, schema: Mapping[str, Any]) -> Any:
    """The value in a structured answer.

    Raises:
        ValueError: there is none, or it does not follow the schema; the message says why.
    """
    if reply.error is not None:
        raise ValueError(reply.error)
    if reply.fault:
        raise ValueError(reply.fault)
    if reply.finish_reason != "stop":
        raise ValueError(_explain_truncation(reply))
    return _parse_value(reply.text, schema)


def _parse_structured(raw: str, answer_format: AnswerFormat) -> tuple[str, str | None, str]:
    """The prose, the JSON, and the problem with the format ("" when there is none)."""
    try:
        value = _parse_value(raw, answer_format.schema)
    except ValueError as error:
        return raw, None, str(error)
    prose = answer_format.to_prose(value).strip()
    return (prose, json_schema.find_json(raw), "") if prose else (raw, None, "the answer's fields are empty")


def _parse_value(text: str, schema: Mapping[str, Any]) -> Any:
    try:
        value = json_schema.parse_json(text)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON: {error}") from error
    if problem := json_schema.find_problem(value, schema):
        raise ValueError(f"the answer does not follow its schema: {problem}")
    return value


def _explain_truncation(reply: Reply) -> str:
    return f"the answer was cut: it did not end within {reply.sampling.max_tokens} tokens"


def _reject(status: CaptionStatus, text: str, error: str) -> Answer:
    return Answer(text=text, fields=None, status=status, error=error)
