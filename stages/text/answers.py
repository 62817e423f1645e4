"""Decides what an answer is accepted for, and what is said of one that is not.

It sees one reply at a time and knows neither the image nor the words that were asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engines import Reply
from pipeline.records import CaptionStatus
from stages.text import json_schema
from stages.text.repetition import find_loop


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, read. With another status than "ok", `text` is what came.

    `error` says what is wrong in general, then, after a colon, with this answer, so that errors can be counted.
    """

    text: str
    fields: str | None  # the JSON of a structured answer
    status: CaptionStatus
    error: str | None


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The form in which a structured answer is asked for."""

    schema: Mapping[str, Any]
    to_prose: Callable[[Any], str]  # from a value that follows the schema


def read_answer(reply: Reply, form: AnswerFormat | None = None) -> Answer:
    """The answer in a reply.

    It is accepted when it finished with "stop", is not empty, does not loop and, with a form, follows it. A loop that
    ran into the limit of tokens is called a loop, for more tokens would not help it.
    """
    came = reply.text.strip()
    if reply.error is not None:
        return _refused("error", came, reply.error)
    if not came:
        return _refused("empty", came, "the answer is empty")
    text, fields, wrong = _formed(came, form)
    if loop := find_loop(text):
        return _refused("repeated", came, f"the answer loops: {loop}")
    if reply.finish_reason != "stop":
        return _refused("truncated", came, _cut(reply))
    if wrong:
        return _refused("invalid", came, wrong)
    return Answer(text=text, fields=fields, status="ok", error=None)


def read_value(reply: Reply, schema: Mapping[str, Any]) -> Any:
    """The value that a structured answer carries.

    Raises:
        ValueError: there is none, or it does not follow the schema; the message says why.
    """
    if reply.error is not None:
        raise ValueError(reply.error)
    if reply.finish_reason != "stop":
        raise ValueError(_cut(reply))
    try:
        value = json_schema.parse_json(reply.text)
    except ValueError as error:
        raise ValueError(f"the answer is no JSON: {error}") from error
    if wrong := json_schema.find_problem(value, schema):
        raise ValueError(f"the answer does not follow its schema: {wrong}")
    return value


def _formed(came: str, form: AnswerFormat | None) -> tuple[str, str | None, str]:
    """Its prose, its JSON and what is wrong with the form."""
    if form is None:
        return came, None, ""
    try:
        value = json_schema.parse_json(came)
    except ValueError as error:
        return came, None, f"the answer is no JSON: {error}"
    if wrong := json_schema.find_problem(value, form.schema):
        return came, None, f"the answer does not follow its schema: {wrong}"
    prose = form.to_prose(value).strip()
    return (prose, json_schema.strip_fence(came), "") if prose else (came, None, "the answer's fields are empty")


def _cut(reply: Reply) -> str:
    return f"the answer was cut: it did not end within {reply.sampling.max_tokens} tokens"


def _refused(status: CaptionStatus, text: str, error: str) -> Answer:
    return Answer(text=text, fields=None, status=status, error=error)
