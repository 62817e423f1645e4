"""Parsing of answers: which are accepted, and the errors of the others."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.engines import Reply
from stages.text import answers
from stages.text.answers import AnswerFormat
from tests.support.texts import ANSWER_SCHEMA, LOOPS, MARKET_CAPTION


def write_prose(value: Any) -> str:
    return f"A {value['kind']}."


@pytest.mark.parametrize(
    ("reply", "structured", "status"),
    [
        (Reply(text=f" {MARKET_CAPTION}\n", finish_reason="stop"), False, "ok"),
        (Reply(error="too long"), False, "error"),
        (Reply(text=" \n", finish_reason="stop"), False, "empty"),
        (Reply(text="", finish_reason="length"), False, "empty"),
        (Reply(text=MARKET_CAPTION, finish_reason="length"), False, "truncated"),
        (Reply(text=LOOPS["a phrase"], finish_reason="stop"), False, "repeated"),
        (Reply(text=LOOPS["a phrase"], finish_reason="length"), False, "repeated"),
        (Reply(text=LOOPS["a phrase"], finish_reason="repetition"), False, "repeated"),
        (Reply(text=MARKET_CAPTION, finish_reason="repetition"), False, "repeated"),
        (Reply(text='{"kind": "cat"}', finish_reason="stop"), True, "ok"),
        (Reply(text='{"kind": "ca', finish_reason="length"), True, "truncated"),
        (Reply(text='{"kind": "ca', finish_reason="stop"), True, "invalid"),
        (Reply(text='{"kind": "cow"}', finish_reason="stop"), True, "invalid"),
        (Reply(text='{"kind": "cat"' + "}" * 90, finish_reason="stop"), True, "repeated"),
    ],
)
def test_answers_are_accepted_or_have_an_error(reply: Reply, structured: bool, status: str) -> None:
    answer = answers.read_answer(
        reply, AnswerFormat(schema=ANSWER_SCHEMA, to_prose=write_prose) if structured else None
    )
    assert answer.status == status and (answer.error is None) == (status == "ok")
    if status == "ok":
        assert (answer.text, answer.fields) == (("A cat.", '{"kind": "cat"}') if structured else (MARKET_CAPTION, None))
    else:
        assert (answer.text, answer.fields) == (reply.text.strip(), None)


def test_the_error_of_an_answer_that_the_engine_stopped_has_what_is_repeated() -> None:
    answer = answers.read_answer(Reply(text=LOOPS["a word"], finish_reason="repetition"))
    assert answer.error and answer.error.startswith("the answer loops: 'very very")
    assert answer.error.endswith("; the engine stopped it")
