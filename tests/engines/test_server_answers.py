"""Responses of servers that are odd, endless or hostile: each is one reply, or one clear error."""

from __future__ import annotations

import asyncio
import json
import math
import re
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, cast

import pytest
from aiohttp import web

from pipeline.engines import Reply, Sampling, clean_reply, finish_attempt
from pipeline.engines._http import MAX_BYTES, bound_bytes
from pipeline.engines._output import build_choice
from pipeline.engines._redaction import MAX_QUOTED, Redactor
from pipeline.errors import EngineDiedError
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


@pytest.mark.parametrize("between", ["\n", " ", "\x00", "\u200b", "\ufffd", "\ud83d", "\\n", "\\u0000", "\r\n\t"])
def test_a_key_with_something_unseen_in_it_is_masked(between: str) -> None:
    for at in (1, 8, 15):
        assert Redactor(KEY).quote(f"no {KEY[:at]}{between}{KEY[at:]} here") == "no *** here"
    spaced = between.join(KEY)
    assert Redactor(KEY).quote(f"no {spaced} here") == "no *** here"


def test_a_key_that_is_cut_off_is_masked() -> None:
    for end in range(len(KEY) // 2, len(KEY)):
        shown = Redactor(KEY).quote(f"wrong key {KEY[:end]}... given")
        assert KEY[: len(KEY) // 2] not in shown and "given" in shown


def test_masking_a_body_keeps_it_parsable() -> None:
    body = json.dumps({"content": f"{KEY[: len(KEY) // 2]}", "other": [KEY, f"{KEY[:3]}\n{KEY[3:]}"]}).encode()
    assert json.loads(Redactor(KEY).mask_body(body))["other"] == ["***", "***"]
    assert ask(lambda *_: complete(SOUND)).text == SOUND


PARTS = [{"type": "text", "text": SOUND[:10]}, {"type": "text", "text": SOUND[10:]}]
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    ("content", "text", "error"),
    [
        (PARTS, SOUND, None),
        ([THINKING, *PARTS], SOUND, None),
        ([SOUND], SOUND, None),
        (PARTS[0], SOUND[:10], None),
        ({"text": SOUND}, SOUND, None),
        (SOUND + " \ud83d\ude00", SOUND + " 😀", None),
        ([SOUND + "\ud83d", "\ude00"], SOUND + "😀", None),
        (None, "", None),
        ([], "", None),
        (7, "", "of type int"),
        (True, "", "of type bool"),
        ({"type": "image", "text": SOUND}, "", "something else"),
        ({"type": ["text"], "text": SOUND}, "", "something else"),
        ([7], "", "something else"),
        (DEEP, "", "something else"),
        ([{"type": "refusal", "refusal": "no\ud83d"}], "", "the model refused: no"),
        ("word " * 60_000, "word " * 52_428 + "word", "300000 characters"),
    ],
)
def test_content_becomes_text_or_is_an_error(content: Any, text: str, error: str | None) -> None:
    reply = ask(lambda *_: complete(content))
    assert (reply.text, reply.fault) == (text, "") and (reply.error is None) == (error is None)
    assert (error or "") in (reply.error or "") and (reply.error or "").isprintable()


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"choices": [{"message": ' * 15_000, b"1" * 100_000, b"\xff", b"[]"]
)
def test_a_body_that_is_no_completion_is_an_error(body: bytes) -> None:
    assert "malformed response" in str(ask(lambda *_: body).error)


@pytest.mark.parametrize(
    ("reason", "stored"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("eos_token", "stop"),
        ("end", "stop"),
        ("end_turn", "stop"),
        ("END_TURN", "stop"),
        ("eot_id", "stop"),
        ("FinishReason.STOP", "stop"),
        (None, "stop"),
        ("", "stop"),
        ("null", "stop"),
        ("None", "stop"),
        ("length", "length"),
        ("FinishReason.MAX_TOKENS", "length"),
        ("MAX_TOKENS", "length"),
    ],
)
def test_servers_names_of_ends_and_cuts_are_known(reason: Any, stored: str) -> None:
    reply = ask(lambda *_: complete(SOUND, reason))
    assert (reply.text, reply.finish_reason, reply.error, reply.fault) == (SOUND, stored, None, "")


def test_a_missing_reason_to_stop_is_an_end_if_there_is_text() -> None:
    assert ask(lambda *_: {"choices": [{"message": {"content": SOUND}}]}).finish_reason == "stop"
    assert ask(lambda *_: {"choices": [{"message": {"content": ""}}]}).finish_reason is None


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (complete(None, "content_filter"), "content filter .*content_filter"),
        (complete("A red", "content_filter"), "content filter .*content_filter"),
        (complete(None, refusal="I cannot describe this person."), "the model refused: I cannot describe this person"),
        (complete(None, "refusal"), "the model refused"),
        (complete(None, "tool_calls", tool_calls=[{"id": "a"}]), "called a tool .*tool_calls"),
        (complete(None, "stop", tool_calls=[{"id": "a"}]), "called a tool .*tool_calls"),
        (complete(SOUND, 7), "finish_reason is of type int"),
        (complete(SOUND, {"a": "\ud83d"}), "finish_reason is of type dict"),
    ],
)
def test_an_answer_that_will_not_change_is_named_and_not_retried(body: dict[str, Any], error: str) -> None:
    with Scripted(lambda *_: body) as server, opened(server) as engine:
        (reply,) = engine.generate([request(0, ladder=(Sampling(),) * 5, accept=lambda _: "never")])
    assert re.search(error, str(reply.error)) and (reply.attempt, server.seen.total()) == (1, 1)


@pytest.mark.parametrize(
    ("body", "fault"), [(complete(SOUND + "\ud83d"), "surrogate"), (complete(SOUND, "odd"), "'odd'")]
)
def test_a_fault_that_another_attempt_may_not_have_is_retried(body: dict[str, Any], fault: str) -> None:
    with Scripted(lambda *_: body) as server, opened(server) as engine:
        (reply,) = engine.generate([request(0, ladder=(Sampling(),) * 3)])
    assert fault in reply.fault == reply.problem and (reply.attempt, reply.error) == (3, None)
    reply.text.encode()


@pytest.mark.parametrize("count", [-1, 2**63, 2**40, "5", None, True, [], 5.5, math.inf, math.nan])
def test_nonsense_counts_are_unknown(count: Any) -> None:
    body = complete(SOUND) | {"usage": {"prompt_tokens": count, "completion_tokens": 5.0}}
    reply = ask(lambda *_: json.dumps(body).encode())
    assert (reply.text, reply.num_prompt_tokens, reply.num_output_tokens) == (SOUND, None, 5)


@pytest.mark.parametrize("usage", [None, [], "x", 7])
def test_odd_usage_leaves_the_answer(usage: Any) -> None:
    reply = ask(lambda *_: complete(SOUND) | {"usage": usage})
    assert (reply.text, reply.num_output_tokens, reply.error) == (SOUND, None, None)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        [],
        "x",
        {"content": 7},
        {"content": [{"logprob": -1}]},
        {"content": [{"token": 3, "logprob": -1}]},
        {"content": [{"token": "a", "logprob": "b"}]},
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": 5}]},
        {"content": ["a"]},
    ],
)
def test_odd_logprobs_leave_the_answer(logprobs: Any) -> None:
    body = complete(SOUND)
    body["choices"][0]["logprobs"] = logprobs
    reply = ask(lambda *_: body)
    assert (reply.text, reply.error) == (SOUND, None) and not reply.tokens


def test_alternatives_that_read_the_same_are_one_and_impossible_ones_none() -> None:
    token = {"token": "a", "logprob": math.log(0.5)}
    others = [token, {"token": "b", "logprob": math.log(0.25)}, {"token": "c", "logprob": -math.inf}]
    body = complete(SOUND)
    body["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": others}]}
    (choice,) = ask(lambda *_: body).tokens or ()
    assert (choice.text, choice.logprobs) == ("a", pytest.approx({"a": math.log(0.5), "b": math.log(0.25)}))
    both = build_choice("a", [("a", math.log(0.5)), ("a", math.log(0.25))])
    assert both.logprobs == pytest.approx({"a": math.log(0.75)})


def test_replies_of_every_engine_are_cleaned() -> None:
    odd = Reply(text="half \ud83d", finish_reason="EOS", num_output_tokens=-1, tokens=cast(Any, (math.nan,)))
    reply, _ = finish_attempt(request(0), odd, 1)
    assert (reply.text, reply.finish_reason, reply.num_output_tokens, reply.tokens) == (
        "half \ufffd",
        "stop",
        None,
        None,
    )
    assert "surrogate" in reply.fault
    sound = Reply(text=SOUND, finish_reason="stop", num_output_tokens=5, tokens=(build_choice(SOUND, [(SOUND, -0.5)]),))
    assert clean_reply(sound) == sound


@pytest.mark.parametrize("encoding", ["", "gzip", "two members of gzip", "deflate", "raw deflate"])
def test_answers_may_be_compressed(encoding: str) -> None:
    body = json.dumps(complete(SOUND)).encode()
    bits = {"": None, "gzip": 31, "two members of gzip": 31, "deflate": 15, "raw deflate": -15}[encoding]
    if bits is not None:
        parts = [body[:9], body[9:]] if encoding.startswith("two") else [body]
        packers = [(zlib.compressobj(wbits=bits), part) for part in parts]
        body = b"".join(packer.compress(part) + packer.flush() for packer, part in packers)
    headers = {"Content-Encoding": encoding.split()[-1]} if encoding else {}
    assert ask(lambda *_: web.Response(body=body, headers=headers)).text == SOUND


async def send_endlessly(
    request: web.Request, *, headers: dict[str, str], chunk: bytes, pause: float
) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    with suppress(ConnectionError):
        while True:
            await response.write(chunk)
            await asyncio.sleep(pause)
    return response


def test_an_endless_body_is_cut_off() -> None:
    reply = ask(lambda r, _: send_endlessly(r, headers={}, chunk=b" " * 2**20, pause=0.0))
    assert "sent more than 0.5" in str(reply.error)


@cache
def make_gzip_bomb() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(128)) + packer.flush()


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_gzip_bomb_is_cut_off(status: int) -> None:
    bomb = make_gzip_bomb()
    tracemalloc.start()
    reply = ask(lambda *_: web.Response(body=bomb, status=status, headers={"Content-Encoding": "gzip"}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "sent more than 0.5" in str(reply.error) and peak < 64 * 2**20


@pytest.mark.slow
def test_answers_that_are_held_back_take_little_memory() -> None:
    async def hold(request: web.Request, _: object) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b" " * (2**19))
        await asyncio.sleep(3)
        return response

    tracemalloc.start()
    with Scripted(hold) as server, opened(server, timeout=2.0, num_tries=1) as engine:
        replies = list(engine.generate([request(number) for number in range(128)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(reply.error for reply in replies) and peak < 200 * 2**20


@pytest.mark.parametrize(("tokens", "top"), [(1, 0), (512, 0), (512, 20), (32_000, 0), (10**6, 20)])
def test_bounds_leave_room_for_any_answer(tokens: int, top: int) -> None:
    choice = {"token": "\u00e9\u00e9", "logprob": -12.345678901234567, "bytes": [195, 169, 195, 169]}
    longest = json.dumps({"content": "\ud83d\ude00" * 3} if not top else {**choice, "top_logprobs": [choice] * top})
    assert bound_bytes(tokens, top) >= min(MAX_BYTES, tokens * len(longest))


def test_a_body_that_trickles_is_cut_off_by_the_timeout() -> None:
    reply = ask(lambda r, _: send_endlessly(r, headers={}, chunk=b" ", pause=0.02), timeout=1.0)
    assert "gave no answer in 1 s" in str(reply.error)


@pytest.mark.parametrize(("encoding", "body"), [("br", b"x"), ("gzip, gzip", b"x"), ("gzip", b"x" * 99)])
def test_an_unknown_or_wrong_encoding_is_an_error(encoding: str, body: bytes) -> None:
    reply = ask(lambda *_: web.Response(body=body, headers={"Content-Encoding": encoding}))
    assert "sent a body" in str(reply.error)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_pictures_are_not_sent_to_another_server(status: int) -> None:
    with Scripted(lambda *_: complete(SOUND)) as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        with pytest.raises(EngineDiedError, match=f"redirects to {other.url}/chat/completions"):
            ask(lambda *_: web.Response(status=status, headers=headers))
        assert other.seen.total() == 0
    headers = {"Location": "http://ada:secret@127.0.0.1:1/chat"}
    with pytest.raises(EngineDiedError, match=r"redirects to http://127\.0\.0\.1:1/chat"):
        ask(lambda *_: web.Response(status=status, headers=headers))


def test_a_redirect_within_a_server_is_followed_but_not_for_ever() -> None:
    def redirect(request: web.Request, _: Any) -> Any:
        again = {"Location": "/v1/chat/completions?again"}
        return complete(SOUND) if "again" in request.query else web.Response(status=307, headers=again)

    assert ask(redirect).text == SOUND
    with pytest.raises(EngineDiedError, match="redirects to /v1"):
        ask(lambda *_: web.Response(status=308, headers={"Location": "/v1/chat/completions"}))


def test_the_key_is_masked_in_every_field_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame-1234")
    for body in (
        complete("a sesame-1234", "sesame-1234"),
        complete("\u0073esame-1234"),
        complete(None, refusal="sesame-1234"),
    ):
        assert "sesame" not in repr(ask(lambda *_, body=body: body, api_key_env="SOME_KEY"))  # type: ignore[misc]
