"""The scheduler that the asynchronous engines share: bounds, order and ends of calls."""

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

from pipeline.engines import Reply, Request, Sampling, find_no_loop
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, SingleFlightCache
from pipeline.errors import BadRequestError, EngineDiedError

BOUNDS = Bounds(max_in_flight=4, saturation=4, num_ahead=3, max_unordered=10, num_threads=2)


@dataclass
class Model:
    """Answers with the request's id, after `seconds` and not before `is_ready`."""

    seconds: Callable[[Request], float] = lambda request: 0.002
    is_ready: Callable[[Request], bool] = lambda request: True
    bad: frozenset[str] = frozenset()
    fatal: str = ""  # the id of the request that kills the engine
    num_in_flight: int = 0
    max_in_flight: int = 0
    sent: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)

    def prepare(self, request: Request) -> str:
        if request.id in self.bad:
            raise BadRequestError(f"{request.id} is bad")
        return request.id

    async def ask(self, prepared: str, request: Request, sampling: Sampling, seed: int) -> Reply:
        self.sent.append(prepared)
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        try:
            await asyncio.sleep(self.seconds(request))
            while not self.is_ready(request):
                await asyncio.sleep(0.001)
            self.answered.add(prepared)
        finally:
            self.num_in_flight -= 1
        if prepared == self.fatal:
            raise EngineDiedError(f"of {prepared}")
        return Reply(text=prepared, finish_reason="stop")


@contextmanager
def scheduling(
    model: Model, bounds: Bounds = BOUNDS, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[RequestScheduler[str]]:
    loop = EventLoopThread("test")
    scheduler = RequestScheduler(bounds, prepare=model.prepare, ask=model.ask, loop=loop, clock=clock)
    try:
        yield scheduler
    finally:
        scheduler.close()
        loop.close()


def make_requests(num: int, first: int = 0) -> list[Request]:
    return [Request(id=str(n), prompt="") for n in range(first, first + num)]


@given(num=st.integers(0, 40), seed=st.integers(0, 99), bad=st.frozensets(st.integers(0, 40)))
@settings(max_examples=20)
def test_replies_come_in_order_however_long_each_takes(num: int, seed: int, bad: frozenset[int]) -> None:
    random = Random(seed)
    model = Model(seconds=lambda _: random.random() * 0.004, bad=frozenset(map(str, bad)))
    with scheduling(model) as scheduler:
        replies = list(scheduler.generate(make_requests(num)))
    assert [reply.error is not None for reply in replies] == [n in bad for n in range(num)]
    assert [reply.text or str(n) for n, reply in enumerate(replies)] == [str(n) for n in range(num)]
    assert model.max_in_flight <= BOUNDS.max_in_flight


def test_two_calls_share_one_budget() -> None:
    model = Model()
    model.is_ready = lambda _: model.max_in_flight == BOUNDS.max_in_flight
    answers: dict[int, list[str]] = {}
    with scheduling(model) as scheduler:

        def work(first: int) -> None:
            answers[first] = [reply.text for reply in scheduler.generate(make_requests(40, first))]

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {first: [str(n) for n in range(first, first + 40)] for first in (0, 100)}
    assert model.max_in_flight == BOUNDS.max_in_flight


def test_a_slow_answer_holds_up_no_more_than_the_reorder_buffer_takes() -> None:
    model = Model()
    model.is_ready = lambda request: request.id != "0" or len(model.sent) == BOUNDS.max_unordered
    with scheduling(model) as scheduler:
        replies = scheduler.generate(make_requests(40))
        first = next(replies)
        assert first.text == "0"
        assert BOUNDS.max_in_flight < len(model.sent) <= BOUNDS.max_unordered + 1
        assert [reply.text for reply in replies] == [str(n) for n in range(1, 40)]


def test_a_retry_keeps_its_slot() -> None:
    model = Model()
    ladder = (Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.0))
    retried = [
        Request(id=str(n), prompt="", ladder=ladder, accept=lambda reply: "" if reply.seed >= 2 else "no")
        for n in range(9)
    ]
    with scheduling(model) as scheduler:
        assert [reply.attempt for reply in scheduler.generate(retried)] == [3] * 9
    assert len(model.sent) == 27 and model.max_in_flight <= BOUNDS.max_in_flight


def test_the_engines_death_ends_a_call_after_the_replies_before_it() -> None:
    model = Model(fatal="20")
    model.is_ready = lambda request: request.id != "20" or {str(n) for n in range(20)} <= model.answered
    with scheduling(model) as scheduler:
        taken: list[str] = []
        with pytest.raises(EngineDiedError, match="of 20"):
            taken.extend(reply.text for reply in scheduler.generate(make_requests(100)))
    assert taken == [str(n) for n in range(20)]


def test_an_exception_in_accept_reaches_the_caller() -> None:
    def accept(_: Reply) -> str:
        raise ZeroDivisionError

    with scheduling(Model()) as scheduler, pytest.raises(ZeroDivisionError):
        list(scheduler.generate([Request(id="0", prompt="", accept=accept)]))


def test_close_ends_a_waiting_call() -> None:
    with scheduling(Model(seconds=lambda _: 60)) as scheduler:
        threading.Timer(0.1, scheduler.close).start()
        with pytest.raises(EngineDiedError, match="closed"):
            list(scheduler.generate(make_requests(3)))
        with pytest.raises(EngineDiedError, match="closed"):
            list(scheduler.generate(make_requests(3)))


def test_a_call_that_stops_early_frees_its_slots() -> None:
    model = Model(seconds=lambda request: 60 if int(request.id) in range(1, 90) else 0.001)
    with scheduling(model) as scheduler:
        replies = scheduler.generate(make_requests(90))
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        assert [reply.text for reply in scheduler.generate(make_requests(9, 100))] == [str(n) for n in range(100, 109)]


def test_requests_of_a_stopped_call_are_not_prepared() -> None:
    prepared, first, go = list[str](), threading.Event(), threading.Event()

    class Slow(Model):
        def prepare(self, request: Request) -> str:
            prepared.append(request.id)
            if request.id != "0":
                first.set()
                go.wait()
            return request.id

    with scheduling(Slow()) as scheduler:
        replies = scheduler.generate(make_requests(90))
        next(replies)
        assert first.wait(10)
        replies.close()  # type: ignore[attr-defined]
        go.set()
        assert [reply.text for reply in scheduler.generate(make_requests(3, 100))] == ["100", "101", "102"]
    assert len(prepared) <= 1 + BOUNDS.num_threads + 3


@pytest.mark.parametrize("most", [1, 2, 5])
def test_small_bounds_and_many_calls_do_not_deadlock(most: int) -> None:
    bounds = Bounds(max_in_flight=most, saturation=1, num_ahead=8, max_unordered=most, num_threads=2)
    with scheduling(Model(seconds=lambda _: 0.0), bounds) as scheduler, ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda n: [reply.text for reply in scheduler.generate(make_requests(30, 100 * n))], range(6))
        assert list(texts) == [[str(100 * n + m) for m in range(30)] for n in range(6)]


@pytest.mark.parametrize(("num_in_flight", "share"), [(0, 1.0), (2, 0.5), (4, 0.0)])
def test_waiting_is_the_idle_share_of_the_engine_while_the_next_request_is_not_ready(
    num_in_flight: int, share: float
) -> None:
    now, model = [0.0], Model(seconds=lambda _: 0.0)
    model.is_ready = lambda _: now[0] > 0

    def wait_for_the_last() -> Iterator[Request]:
        yield from make_requests(num_in_flight)
        while model.num_in_flight < num_in_flight:
            time.sleep(0.001)
        now[0] += 10.0
        yield from make_requests(1, 100)

    with scheduling(model, clock=lambda: now[0]) as scheduler:
        assert scheduler.waiting() is None
        assert len(list(scheduler.generate(wait_for_the_last()))) == num_in_flight + 1
        assert scheduler.waiting() == share
        assert scheduler.waiting() is None


def test_concurrent_callers_compute_a_value_cache() -> None:
    cache: SingleFlightCache[int] = SingleFlightCache(2)
    computed: list[int] = []

    def make(n: int) -> int:
        time.sleep(0.02)
        computed.append(n)
        return n

    threads = [threading.Thread(target=lambda: cache(1, lambda: make(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache(n, lambda n=n: make(n)) for n in (1, 2, 3, 1)] == [1, 2, 3, 1]
    assert computed == [1, 2, 3, 1]


def test_a_failed_value_is_computed_again() -> None:
    cache: SingleFlightCache[int] = SingleFlightCache(2)
    with pytest.raises(ZeroDivisionError):
        cache(1, lambda: 1 // 0)
    assert cache(1, lambda: 7) == 7


@pytest.mark.parametrize(
    ("is_loop", "text", "stopped"),
    [(True, "la la la", True), (False, "la la la and the end", False), (True, "<think>la la la", False)],
)
def test_only_a_loop_for_the_request_may_be_stopped(is_loop: bool, text: str, stopped: bool) -> None:
    async def ask(prepared: str, request: Request, sampling: Sampling, seed: int) -> Reply:
        if request.find_loop is find_no_loop:
            return Reply(text=text, finish_reason="length")
        return Reply(text=text[: text.index("la") + 8], finish_reason="repetition")

    loop = EventLoopThread("test")
    scheduler = RequestScheduler(BOUNDS, prepare=lambda request: request.id, ask=ask, loop=loop)
    request = Request(id="0", prompt="", find_loop=lambda _: "a loop" if is_loop else "")
    (reply,) = scheduler.generate([request])
    scheduler.close()
    loop.close()
    assert reply.finish_reason == ("repetition" if stopped else "length")
