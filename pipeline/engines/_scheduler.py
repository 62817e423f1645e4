"""Decides how many questions are under way at once, in what order answers leave, and who waited for whom.

It knows nothing of models or wires: it is given `prepare`, which runs in threads ahead of the model, and `ask`, which
is awaited on an event loop of its own. All calls of `generate` share one window, so that nothing drains between them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from pipeline.engines import Reply, Request, Sampling, finish_attempt
from pipeline.errors import BadRequestError, EngineDiedError

T = TypeVar("T")
P = TypeVar("P")  # what `prepare` makes of a request
P_in = TypeVar("P_in", contravariant=True)


class Ask(Protocol[P_in]):
    """One attempt at a request. Raises BadRequestError, or EngineDiedError when no attempt can succeed any more."""

    async def __call__(self, prepared: P_in, request: Request, sampling: Sampling, seed: int) -> Reply: ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much of everything there is at most, counted in requests."""

    max_in_flight: int  # asked and not answered, over all calls
    enough: int  # with this many in flight the engine has all it can use, at least 1
    num_ahead: int  # drawn and being prepared, over all calls
    max_unordered: int  # drawn by one call and not yet taken from it: the reorder buffer and what is in flight
    num_threads: int  # that prepare


class RequestScheduler(Generic[P]):
    """Answers requests through `ask`, many at once, and gives the replies back in order."""

    def __init__(self, bounds: Bounds, *, prepare: Callable[[Request], P], ask: Ask[P], loop: EventLoopThread) -> None:
        self._bounds, self._prepare, self._ask, self._loop = bounds, prepare, ask, loop
        self._most_drawn = bounds.max_in_flight + bounds.num_ahead
        self._few_drawn = self._most_drawn - bounds.num_ahead // 2
        self._full = False
        self._pool = ThreadPoolExecutor(bounds.num_threads, thread_name_prefix="prepare")
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._in_flight = asyncio.Semaphore(bounds.max_in_flight)
        self._calls: set[_Call] = set()
        self._num_drawn = 0  # and not answered
        self._num_asking = 0
        self._meter = _Meter()
        self._closed = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        call = _Call(self._lock)
        with self._lock:
            self._refuse_when_closed()
            self._calls.add(call)
        feeder = threading.Thread(target=self._feed, args=(call, iter(requests)), name="feeder", daemon=True)
        feeder.start()
        try:
            yield from self._replies(call)
        finally:
            self._end(call)
            feeder.join(timeout=1)  # it may be held up in the caller's own iterator; then it ends when that goes on

    def waiting(self) -> float | None:
        with self._lock:
            return self._meter.share(busy=bool(self._calls))

    def close(self) -> None:
        """Ends all calls. Idempotent."""
        with self._lock:
            self._closed = True
            for call in self._calls:
                call.fail(EngineDiedError("the engine was closed while it was asked"))
            self._room.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise EngineDiedError("the engine is closed")

    def _replies(self, call: _Call) -> Iterator[Reply]:
        while (reply := call.take()) is not None:
            with self._lock:
                if call.num_held == self._bounds.max_unordered - 1:
                    self._room.notify_all()
            yield reply

    def _end(self, call: _Call) -> None:
        with self._lock:
            call.stopped = True
            self._calls.discard(call)
            self._room.notify_all()
            self._measure()
        self._loop.call_soon(call.cancel)

    # The feeder's thread.

    def _feed(self, call: _Call, requests: Iterator[Request]) -> None:
        error: Exception | None = None
        try:
            while self._wait_for_room(call) and (request := next(requests, None)) is not None:
                self._start(call, request)
        except Exception as raised:  # the caller's own: it is raised again where the caller takes its replies
            error = raised
        with self._lock:
            self._num_drawn -= call.drawing
            self._room.notify_all()
            call.ended(error)
            self._measure()

    def _wait_for_room(self, call: _Call) -> bool:
        """Waits until one more request may be drawn; False when nobody wants its reply any more."""
        with self._lock:
            self._room.wait_for(
                lambda: call.over or (not self._is_full() and call.num_held < self._bounds.max_unordered)
            )
            if call.over:
                return False
            self._num_drawn += 1
            call.drawing = True
            self._measure()
        return True

    def _is_full(self) -> bool:
        """Once full, until there is room for several: waking the feeders for each one costs more than drawing it."""
        if self._num_drawn >= self._most_drawn:
            self._full = True
        elif self._num_drawn < self._few_drawn:
            self._full = False
        return self._full

    def _start(self, call: _Call, request: Request) -> None:
        with self._lock:
            n = call.draw()

        def prepare() -> P:
            if call.over:
                raise BadRequestError("nobody waits for it")
            return self._prepare(request)

        def answer(prepared: Future[P]) -> None:
            call.spawn(self._answer(request, prepared), lambda task: self._finish(call, n, task))

        # The loop is woken once for a request, when it can be asked.
        self._pool.submit(prepare).add_done_callback(lambda done: self._loop.call_soon(partial(answer, done)))

    # The loop's thread.

    def _finish(self, call: _Call, n: int, task: asyncio.Task[Reply]) -> None:
        with self._lock:
            self._num_drawn -= 1
            if not task.cancelled():
                call.put(n, task)
            if not self._is_full() or call.over:
                self._room.notify_all()
            self._measure()

    async def _answer(self, request: Request, prepared: Future[P]) -> Reply:
        try:
            ready = prepared.result()
        except BadRequestError as error:
            return finish_attempt(request, Reply(error=str(error)), 1)[0]
        async with self._in_flight:
            self._count(+1)
            try:
                return await self._climb(request, ready)
            finally:
                self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_asking += change
            self._measure()

    async def _climb(self, request: Request, ready: P) -> Reply:
        """Asks again, up the ladder, without leaving the window: the engine never sees a tail of retries."""
        attempt, final = 0, False
        while not final:
            attempt += 1
            try:
                reply = await self._ask(ready, request, request.ladder[attempt - 1], request.seed + attempt - 1)
            except BadRequestError as error:
                reply = Reply(error=str(error))
            reply, final = finish_attempt(request, reply, attempt)
        return reply

    def _measure(self) -> None:
        """Notes how much of what the engine can use stands empty because whatever is next is not ready."""
        coming = bool(self._calls) and self._num_drawn > self._num_asking
        empty = max(0.0, 1 - self._num_asking / self._bounds.enough)
        self._meter.note(starved=empty if coming else 0.0, busy=bool(self._calls))


class ScheduledEngine:
    """An engine that is asked through a window alone."""

    _window: RequestScheduler[Any]

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return self._window.generate(requests)

    def waiting(self) -> float | None:
        return self._window.waiting()


class _Call:
    """One `generate`: which replies are there, which is next, and how it ends. Guarded by the window's lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._news = threading.Condition(lock)
        self._replies: dict[int, Reply] = {}
        self._num_started = 0
        self._num_taken = 0
        self._last = False  # no more requests will come
        self._error: BaseException | None = None  # at once
        self._error_at_end: Exception | None = None  # after all replies
        self._tasks: set[asyncio.Task[Reply]] = set()  # the loop's alone
        self.drawing = False
        self.stopped = False

    @property
    def over(self) -> bool:
        return self.stopped or self._error is not None

    @property
    def num_held(self) -> int:
        return self._num_started - self._num_taken

    def draw(self) -> int:
        self.drawing = False
        self._num_started += 1
        return self._num_started - 1

    def ended(self, error: Exception | None) -> None:
        self.drawing = False
        self._last, self._error_at_end = True, error
        self._news.notify_all()

    def put(self, n: int, task: asyncio.Task[Reply]) -> None:
        if error := task.exception():  # the engine's death, or a fault in `accept`: the call cannot go on
            self.fail(error)
            return
        self._replies[n] = task.result()
        if n == self._num_taken:
            self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._news.notify_all()

    def take(self) -> Reply | None:
        """The next reply, waited for; None at the end."""
        with self._news:
            self._news.wait_for(lambda: self._num_taken in self._replies or self._error or self._complete)
            if self._num_taken in self._replies:
                self._num_taken += 1
                return self._replies.pop(self._num_taken - 1)
            if error := self._error or self._error_at_end:
                raise error
            return None

    @property
    def _complete(self) -> bool:
        return self._last and self._num_taken == self._num_started

    def spawn(self, work: Coroutine[Any, Any, Reply], done: Callable[[asyncio.Task[Reply]], None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        if self.stopped:
            task.cancel()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


class _Meter:
    """How much of the engine stood empty for want of input, on average over the time in which anything was asked."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._starved, self._busy = 0.0, False
        self._starved_for = self._busy_for = 0.0  # seconds

    def note(self, *, starved: float, busy: bool) -> None:
        now = time.monotonic()
        self._starved_for += (now - self._since) * self._starved
        self._busy_for += (now - self._since) * self._busy
        self._since, self._starved, self._busy = now, starved, busy

    def share(self, *, busy: bool) -> float | None:
        self.note(starved=self._starved, busy=busy)
        share = self._starved_for / self._busy_for if self._busy_for else None
        self._starved_for = self._busy_for = 0.0
        return share


class EventLoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call_soon(self, do: Callable[[], object]) -> None:
        """Has something done on the loop; nothing when that has been closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(do)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits, in the caller's thread, for what is done on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Does `last`, cancels what is left and ends the thread. Idempotent."""
        with self._closing:
            if self._loop.is_closed():
                return
            if last is not None:
                self.run(last())
            self.run(_cancel_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class SingleFlightCache(Generic[T]):
    """Does what neighbours have in common once: the last few results are kept; who comes second waits for the first.

    A failure is told to those who wait for it, and not kept: the next one tries again.
    """

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, Future[T]] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if (found := self._results.get(key)) is None:
                mine = self._results[key] = Future()
                while len(self._results) > self._num_kept:
                    self._results.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            mine.set_result(make())
        except BaseException as error:  # whoever waits for it must hear of it, whatever it is; raised again
            with self._lock:
                if self._results.get(key) is mine:
                    del self._results[key]
            mine.set_exception(error)
            raise
        return mine.result()
