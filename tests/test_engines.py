"""What every engine promises, whatever answers behind it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import Engine, EngineDied, Reply, Request, Sampling
from pipeline.engines import echo, openai, transformers
from tests import tiny
from tests.faults import Faulty

HOT = Sampling(temperature=1.0, max_tokens=16)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "enum": ["yes", "partly", "no"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        },
        "required": ["verdict", "stars"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An engine with what the test must know of it."""

    engine: Engine
    num_ahead: int  # requests that it may draw beyond the replies that were taken
    num_tokens: int | None = None  # of its context


@contextmanager
def open_echo(_: Path) -> Iterator[Opened]:
    yield Opened(engine=echo.open(echo.Config()), num_ahead=1)


@contextmanager
def open_transformers(model: Path) -> Iterator[Opened]:
    config = transformers.Config(model=str(model), dtype="float32", batch_size=4)
    yield Opened(engine=transformers.open(config), num_ahead=24, num_tokens=2048)


@contextmanager
def open_openai(_: Path) -> Iterator[Opened]:
    with Faulty(share=0.1, faults=("500", "429", "broken", "closed")) as server:
        config = openai.Config(model="echo", base_url=server.url, max_in_flight=4)
        yield Opened(engine=openai.open(config), num_ahead=16)


@pytest.fixture(scope="module", params=[open_echo, open_transformers, open_openai], ids=lambda way: way.__name__[5:])
def opened(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Opened]:
    with request.param(tiny_model) as found:
        yield found
        found.engine.close()
        found.engine.close()  # closing twice is closing


@pytest.fixture
def engine(opened: Opened) -> Engine:
    return opened.engine


@cache
def picture(n: int) -> bytes:
    return tiny.photograph(n)


def request(n: int, **changes: Any) -> Request:
    plain = Request(id=str(n), prompt="Describe it.", images=(picture(n),), ladder=(HOT,), seed=n)
    return replace(plain, **changes)


def ask(engine: Engine, *requests: Request) -> list[Reply]:
    return list(engine.generate(requests))


def test_there_are_as_many_replies_as_requests_and_in_their_order(engine: Engine) -> None:
    alone = [ask(engine, request(n))[0].text for n in range(12)]
    assert [reply.text for reply in ask(engine, *(request(n) for n in range(12)))] == alone
    assert len(set(alone)) > 6
    assert ask(engine) == []


def test_a_request_that_cannot_be_answered_is_an_error_and_its_neighbours_are_answered(opened: Opened) -> None:
    bad: list[dict[str, Any]] = [{"images": (b"",)}, {"schema": "{"}]
    if opened.num_tokens is not None:
        bad += [
            {"images": (picture(1)[: len(picture(1)) // 2],)},
            {"prompt": "Describe it, please. " * (opened.num_tokens // 10)},
        ]
    requests = [part for n, change in enumerate(bad) for part in (request(n, **change), request(n))]
    replies = ask(opened.engine, *requests)
    assert [reply.error is None for reply in replies] == [False, True] * len(bad)
    assert all(reply.text == "" and reply.attempt == 1 for reply in replies if reply.error)


def test_an_answer_that_is_not_accepted_is_asked_again_up_the_ladder(engine: Engine) -> None:
    ladder = (HOT, replace(HOT, top_p=0.9), replace(HOT, top_p=0.8))
    attempts: list[Reply] = []

    def accept(reply: Reply) -> str:
        attempts.append(reply)
        return "" if len(attempts) == 2 else "too early"

    (reply,) = ask(engine, request(5, ladder=ladder, accept=accept))
    assert (reply.attempt, reply.problem, reply.sampling, reply.seed) == (2, "", ladder[1], 6)
    assert [attempt.seed for attempt in attempts] == [5, 6]
    (reply,) = ask(engine, request(5, ladder=ladder, accept=lambda _: "never"))
    assert (reply.attempt, reply.problem, reply.sampling, reply.seed) == (3, "never", ladder[2], 7)


def test_a_seed_decides_the_answer_whoever_is_asked_beside(engine: Engine) -> None:
    (first,) = ask(engine, request(0, seed=1))
    crowd = ask(engine, *(request(n) for n in range(1, 7)), request(0, seed=1), request(0, seed=2))
    assert crowd[-2].text == first.text != crowd[-1].text


def test_a_schema_is_followed(engine: Engine) -> None:
    ladder = (replace(HOT, max_tokens=64),)
    for reply in ask(engine, *(request(n, schema=SCHEMA, ladder=ladder) for n in range(6))):
        values = json.loads(reply.text)
        assert sorted(values) == ["stars", "verdict"]
        assert values["verdict"] in ("yes", "partly", "no") and 1 <= values["stars"] <= 5


def test_counts_and_log_probabilities_are_of_the_tokens(engine: Engine) -> None:
    without, with_them = ask(engine, request(0), request(0, logprobs=True))
    assert without.logprobs is None and without.num_prompt_tokens
    assert with_them.logprobs is not None and max(with_them.logprobs) <= 0
    assert len(with_them.logprobs) == with_them.num_output_tokens


def test_two_threads_share_an_engine(engine: Engine) -> None:
    answers: dict[int, list[str]] = {}

    def work(first: int) -> None:
        answers[first] = [reply.text for reply in ask(engine, *(request(n) for n in range(first, first + 10)))]

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in (0, 100):
        assert answers[first] == [reply.text for reply in ask(engine, *(request(first + n) for n in range(10)))]


def test_an_engine_has_a_name(engine: Engine) -> None:
    assert isinstance(engine, Engine) and engine.model


def test_requests_are_drawn_lazily(opened: Opened) -> None:
    drawn = 0

    def draw() -> Iterator[Request]:
        nonlocal drawn
        for n in range(3 * opened.num_ahead):
            drawn += 1
            yield request(n % 8)

    replies = opened.engine.generate(draw())
    assert drawn == 0
    next(replies)
    time.sleep(0.5)
    assert drawn <= 1 + opened.num_ahead
    for taken, _ in enumerate(replies, 2):
        assert drawn <= taken + opened.num_ahead
    assert drawn == 3 * opened.num_ahead


def test_the_caller_may_stop_early_and_ask_again(engine: Engine) -> None:
    replies = engine.generate(request(n % 8) for n in range(1000))
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert len(ask(engine, request(0), request(1))) == 2


def test_what_the_callers_iterator_raises_reaches_the_caller_after_the_replies_before(engine: Engine) -> None:
    def broken() -> Iterator[Request]:
        yield request(0)
        raise ZeroDivisionError

    replies = engine.generate(broken())
    assert next(replies).error is None
    with pytest.raises(ZeroDivisionError):
        next(replies)


def test_transformers_answers_greedily_whatever_else_is_in_the_batch(tiny_model: Path) -> None:
    greedy = Sampling(max_tokens=32)
    requests = [request(n, ladder=(greedy,), prompt="Describe it. " * (n % 3 + 1)) for n in range(24)]
    texts = []
    for batch_size in (1, 8):
        engine = transformers.open(transformers.Config(model=str(tiny_model), dtype="float32", batch_size=batch_size))
        texts.append([reply.text for reply in ask(engine, *requests)])
        engine.close()
    assert texts[0] == texts[1]


FAILURES: list[tuple[str, Callable[[Reply], bool]]] = [
    ("error_share", lambda reply: reply.error is not None),
    ("empty_share", lambda reply: reply.text == ""),
    ("truncated_share", lambda reply: reply.finish_reason == "length"),
    ("repeated_share", lambda reply: max(Counter(reply.text.split()).values()) > 16),
    ("invalid_share", lambda reply: not reply.text.endswith("}")),
]


@pytest.mark.parametrize(("share", "failed"), FAILURES)
def test_echo_fails_as_often_as_it_is_told_to(share: str, failed: Callable[[Reply], bool]) -> None:
    schema = SCHEMA if share == "invalid_share" else None
    requests = [request(0, seed=seed, schema=schema) for seed in range(400)]
    replies = ask(echo.open(echo.Config(**{share: 0.25})), *requests)
    assert 60 < sum(map(failed, replies)) < 140
    assert replies == ask(echo.open(echo.Config(**{share: 0.25})), *requests)


def test_echo_dies_when_told_to() -> None:
    engine = echo.open(echo.Config(die_after=3))
    replies = engine.generate(request(n) for n in range(9))
    assert [next(replies).error for _ in range(3)] == [None] * 3
    with pytest.raises(EngineDied, match="die_after"):
        next(replies)


def test_echo_reads_every_part_of_a_request() -> None:
    engine = echo.open(echo.Config())
    changes = [{"prompt": "x"}, {"system": "x"}, {"images": (b"x",)}, {"images": (b"y",)}, {"seed": 1}, {}]
    assert len({ask(engine, request(0, **change))[0].text for change in changes}) == len(changes)
