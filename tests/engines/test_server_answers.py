"""Responses of servers that are odd, endless or hostile: each is one reply, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from pipeline.engines import Reply
from pipeline.engines._redaction import MAX_QUOTED, Redactor
from tests.engines.test_openai import opened, request
from tests.support.scripted import SOUND, Scripted, complete

KEY = "sesame-1234/5678"


def ask(respond: Callable[[web.Request, dict[str, Any]], Any], **changes: Any) -> Reply:
    with Scripted(respond) as server, opened(server, **{"num_tries": 1, **changes}) as engine:
        (reply,) = engine.generate([request(0)])
    return reply


def respond_400(text: str) -> web.Response:
    return web.json_response({"error": {"message": text}}, status=400)


@pytest.mark.parametrize("at", [0, MAX_QUOTED - len(KEY) - 20, MAX_QUOTED - 8, MAX_QUOTED - 1, MAX_QUOTED + 5])
@pytest.mark.parametrize(
    "make_response",
    [
        lambda text: text.encode(),
        lambda text: json.dumps({"detail": text}).encode(),
        lambda text: json.dumps({"choices": [{"message": text}]}).encode(),
        respond_400,
        lambda text: web.Response(text=text, status=422),
        lambda text: web.Response(text=text, status=500),
        lambda text: complete(text),
    ],
)
def test_the_key_is_masked_before_a_message_is_cut(
    make_response: Callable[[str], Any], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    reply = ask(lambda *_: make_response("x" * at + KEY), api_key_env="SOME_KEY")
    shown = f"{reply.error} {reply.text} {reply.problem}"
    assert not any(KEY[:n] in shown for n in range(6, len(KEY)))


def test_a_key_that_is_an_ordinary_word_stays_in_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "EMPTY")
    assert ask(lambda *_: complete("An EMPTY box."), api_key_env="SOME_KEY").text == "An EMPTY box."


def test_other_spellings_of_a_key_are_masked_and_quotes_are_printable() -> None:
    redactor = Redactor('a"b/c d€')
    assert redactor.quote('1 a\\"b/c d\\u20ac 2 a%22b%2Fc%20d%E2%82%AC 3\n\x1b[31m\ud83d') == "1 *** 2 *** 3 [31m"
    assert Redactor("").quote("plain") == "plain"
    assert ask(lambda *_: complete(SOUND)).text == SOUND
