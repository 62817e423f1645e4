"""The window that the asynchronous engines share: bounds, order, and what ends it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines import Reply, Request, Sampling
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, SingleFlightCache
from pipeline.errors import BadRequestError, EngineDiedError

BOUNDS = Bounds(max_in_flight=4, enough=4, num_ahead=3, max_unordered=10, num_threads=2)


@dataclass
class Model:
    """Answers with the request's id, each after a time of its own."""

    seconds: Callable[[Request], float] = lambda request: 0.002
    bad: frozenset[str] = frozenset()
    dies_of: str = ""
    num_asking: int = 0
    most_asking: int = 0
    asked: list[str] = field(default_factory=list)

    def prepare(self, request: Request) -> str:
        if request.id in self.bad:
            raise BadRequestError(f"{request.id} is bad")
        return request.id

    async def ask(self, prepared: str, request: Request, sampling: Sampling, seed: int) -> Reply:
        self.asked.append(prepared)
        self.num_asking += 1
        self.most_asking = max(self.most_asking, self.num_asking)
        try:
            await asyncio.sleep(self.seconds(request))
        finally:
            self.num_asking -= 1
        if prepared == self.dies_of:
            raise EngineDiedError(f"of {prepared}")
        return Reply(text=prepared, finish_reason="stop")


@contextmanager
def window(model: Model, bounds: Bounds = BOUNDS) -> Iterator[RequestScheduler[str]]:
    loop = EventLoopThread("test")
    opened = RequestScheduler(bounds, prepare=model.prepare, ask=model.ask, loop=loop)
    try:
        yield opened
    finally:
        opened.close()
        loop.close()


def requests(num: int, first: int = 0) -> list[Request]:
    return [Request(id=str(n), prompt="") for n in range(first, first + num)]


@given(num=st.integers(0, 40), seed=st.integers(0, 99), bad=st.frozensets(st.integers(0, 40)))
@settings(max_examples=20)
def test_order_and_count_hold_whatever_takes_how_long(num: int, seed: int, bad: frozenset[int]) -> None:
    random = Random(seed)
    model = Model(seconds=lambda _: random.random() * 0.004, bad=frozenset(map(str, bad)))
    with window(model) as opened:
        replies = list(opened.generate(requests(num)))
    assert [reply.error is not None for reply in replies] == [n in bad for n in range(num)]
    assert [reply.text or str(n) for n, reply in enumerate(replies)] == [str(n) for n in range(num)]
    assert model.most_asking <= BOUNDS.max_in_flight


def test_two_calls_share_one_window() -> None:
    model = Model()
    answers: dict[int, list[str]] = {}
    with window(model) as opened:

        def work(first: int) -> None:
            answers[first] = [reply.text for reply in opened.generate(requests(40, first))]

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {first: [str(n) for n in range(first, first + 40)] for first in (0, 100)}
    assert model.most_asking == BOUNDS.max_in_flight


def test_a_slow_answer_holds_up_no_more_than_the_reorder_buffer_takes() -> None:
    model = Model(seconds=lambda request: 0.3 if request.id == "0" else 0.001)
    with window(model) as opened:
        replies = opened.generate(requests(40))
        first = next(replies)
        assert first.text == "0"
        assert BOUNDS.max_in_flight < len(model.asked) <= BOUNDS.max_unordered + 1
        assert [reply.text for reply in replies] == [str(n) for n in range(1, 40)]


def test_what_is_asked_again_stays_in_the_window() -> None:
    model = Model()
    ladder = (Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.0))
    again = [
        Request(id=str(n), prompt="", ladder=ladder, accept=lambda reply: "" if reply.seed >= 2 else "no")
        for n in range(9)
    ]
    with window(model) as opened:
        assert [reply.attempt for reply in opened.generate(again)] == [3] * 9
    assert len(model.asked) == 27 and model.most_asking <= BOUNDS.max_in_flight


def test_death_ends_every_call_and_what_was_answered_before_is_given() -> None:
    model = Model(dies_of="20", seconds=lambda request: 0.05 if request.id == "20" else 0.001)
    with window(model) as opened:
        taken: list[str] = []
        with pytest.raises(EngineDiedError, match="of 20"):
            taken.extend(reply.text for reply in opened.generate(requests(100)))
    assert taken == [str(n) for n in range(20)]


def test_a_fault_in_accept_is_raised_where_the_replies_are_taken() -> None:
    def accept(_: Reply) -> str:
        raise ZeroDivisionError

    with window(Model()) as opened, pytest.raises(ZeroDivisionError):
        list(opened.generate([Request(id="0", prompt="", accept=accept)]))


def test_closing_ends_a_call_that_waits() -> None:
    with window(Model(seconds=lambda _: 60)) as opened:
        threading.Timer(0.1, opened.close).start()
        with pytest.raises(EngineDiedError, match="closed"):
            list(opened.generate(requests(3)))
        with pytest.raises(EngineDiedError, match="closed"):
            list(opened.generate(requests(3)))


def test_stopping_early_gives_the_room_back() -> None:
    model = Model(seconds=lambda request: 60 if int(request.id) in range(1, 90) else 0.001)
    with window(model) as opened:
        replies = opened.generate(requests(90))
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        assert [reply.text for reply in opened.generate(requests(9, 100))] == [str(n) for n in range(100, 109)]


def test_what_nobody_waits_for_is_not_prepared() -> None:
    prepared, first, go = list[str](), threading.Event(), threading.Event()

    class Slow(Model):
        def prepare(self, request: Request) -> str:
            prepared.append(request.id)
            if request.id != "0":
                first.set()
                go.wait()
            return request.id

    with window(Slow()) as opened:
        replies = opened.generate(requests(90))
        next(replies)
        assert first.wait(10)
        replies.close()  # type: ignore[attr-defined]
        go.set()
        assert [reply.text for reply in opened.generate(requests(3, 100))] == ["100", "101", "102"]
    assert len(prepared) <= 1 + BOUNDS.num_threads + 3


@pytest.mark.parametrize("most", [1, 2, 5])
def test_small_windows_and_many_calls_come_to_an_end(most: int) -> None:
    bounds = Bounds(max_in_flight=most, enough=1, num_ahead=8, max_unordered=most, num_threads=2)
    with window(Model(seconds=lambda _: 0.0), bounds) as opened, ThreadPoolExecutor(6) as pool:
        said = pool.map(lambda n: [reply.text for reply in opened.generate(requests(30, 100 * n))], range(6))
        assert list(said) == [[str(100 * n + m) for m in range(30)] for n in range(6)]


def test_waiting_is_the_share_of_time_that_the_engine_lacked_input() -> None:
    def slowly() -> Iterator[Request]:
        for request in requests(10):
            time.sleep(0.03)
            yield request

    with window(Model(seconds=lambda _: 0.02)) as opened:
        assert opened.waiting() is None
        list(opened.generate(slowly()))
        starved = opened.waiting()
        list(opened.generate(requests(100)))
        fed = opened.waiting()
    assert starved is not None and starved > 0.6
    assert fed is not None and fed < 0.4


def test_an_engine_that_is_half_full_waits_half_the_time() -> None:
    def two_then_none() -> Iterator[Request]:
        yield from requests(2)
        time.sleep(0.5)

    with window(Model(seconds=lambda _: 0.5)) as opened:
        list(opened.generate(two_then_none()))
        waited = opened.waiting()
    assert waited is not None and 0.2 < waited < 0.9


def test_neighbours_do_in_common_things_once() -> None:
    once: SingleFlightCache[int] = SingleFlightCache(2)
    made: list[int] = []

    def make(n: int) -> int:
        time.sleep(0.02)
        made.append(n)
        return n

    threads = [threading.Thread(target=lambda: once(1, lambda: make(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [once(n, lambda n=n: make(n)) for n in (1, 2, 3, 1)] == [1, 2, 3, 1]
    assert made == [1, 2, 3, 1]


def test_what_failed_once_is_tried_again() -> None:
    once: SingleFlightCache[int] = SingleFlightCache(2)
    with pytest.raises(ZeroDivisionError):
        once(1, lambda: 1 // 0)
    assert once(1, lambda: 7) == 7
