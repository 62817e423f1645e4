"""What every engine promises, whatever answers behind it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from pipeline.engine import Engine, EngineDied, Reply, Request, Sampling
from pipeline.engines import echo

HOT = Sampling(temperature=1.0, max_tokens=24)
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


@pytest.fixture
def engine() -> Iterator[Engine]:
    with closing(echo.open(echo.Config())) as opened:
        yield opened


def request(n: int, **changes: Any) -> Request:
    plain = Request(id=str(n), prompt=f"Describe picture {n}.", ladder=(HOT,), seed=n)
    return replace(plain, **changes)


def ask(engine: Engine, *requests: Request) -> list[Reply]:
    return list(engine.generate(requests))


def test_there_are_as_many_replies_as_requests_and_in_their_order(engine: Engine) -> None:
    alone = [ask(engine, request(n))[0].text for n in range(12)]
    assert [reply.text for reply in ask(engine, *(request(n) for n in range(12)))] == alone
    assert len(set(alone)) > 6
    assert ask(engine) == []


def test_a_request_that_cannot_be_answered_is_an_error_and_its_neighbours_are_answered(engine: Engine) -> None:
    replies = ask(engine, request(0), request(1, images=(b"",)), request(2))
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert replies[1].text == "" and replies[1].attempt == 1


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


def test_a_seed_decides_the_answer(engine: Engine) -> None:
    first, again, other = (ask(engine, request(0, seed=seed))[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_a_schema_is_followed(engine: Engine) -> None:
    for reply in ask(engine, *(request(n, schema=SCHEMA, ladder=(replace(HOT, max_tokens=64),)) for n in range(6))):
        values = json.loads(reply.text)
        assert sorted(values) == ["stars", "verdict"]
        assert values["verdict"] in ("yes", "partly", "no") and 1 <= values["stars"] <= 5


def test_log_probabilities_come_when_asked_for_one_a_token(engine: Engine) -> None:
    without, with_them = ask(engine, request(0), request(0, logprobs=True))
    assert without.logprobs is None
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
        assert answers[first] == [ask(engine, request(n))[0].text for n in range(first, first + 10)]


def test_closing_twice_is_closing(engine: Engine) -> None:
    engine.close()
    engine.close()


def test_what_an_engine_is_stands_in_its_name_and_revision(engine: Engine) -> None:
    assert isinstance(engine, Engine) and engine.model


def drawn_ahead(engine: Engine, num_requests: int) -> int:
    """How many requests were drawn, at most, beyond the replies that had been taken."""
    drawn, most = 0, 0

    def draw() -> Iterator[Request]:
        nonlocal drawn
        for n in range(num_requests):
            drawn += 1
            yield request(n)

    for taken, _ in enumerate(engine.generate(draw())):
        most = max(most, drawn - taken)
    return most


def test_requests_are_drawn_lazily(engine: Engine) -> None:
    assert drawn_ahead(engine, 20) == 1


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
    replies = ask(echo.open(echo.Config(**{share: 0.25})), *(request(n, schema=schema) for n in range(400)))
    assert 60 < sum(map(failed, replies)) < 140
    assert replies == ask(echo.open(echo.Config(**{share: 0.25})), *(request(n, schema=schema) for n in range(400)))


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
