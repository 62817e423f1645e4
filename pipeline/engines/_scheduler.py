"""Request scheduling: bounded concurrency, in-order replies, and the share of time an engine was idle.

It knows nothing of models or protocols. It is given `prepare`, which runs in threads ahead of the model, and `ask`,
which is awaited on an event loop of its own. All calls of `generate` share one set of bounds, so that the engine does
not drain between them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from pipeline.engines import Reply, Request, Sampling, find_no_loop, finish_attempt, is_wanted_stop
from pipeline.errors import BadRequestError, EngineDiedError

T = TypeVar("T")
P = TypeVar("P")  # what `prepare` returns
P_in = TypeVar("P_in", contravariant=True)


class Ask(Protocol[P_in]):
    """One attempt at a request, which may end early if `request.find_loop` is set.

    Raises BadRequestError, or EngineDiedError when no attempt can succeed any more.
    """

    async def __call__(self, prepared: P_in, request: Request, sampling: Sampling, seed: int) -> Reply: ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Upper bounds, counted in requests."""

    max_in_flight: int  # sent and not answered, over all calls
    saturation: int  # the engine is fully used with this many in flight; at least 1
    num_ahead: int  # drawn and being prepared, over all calls
    max_unordered: int  # drawn by one call and not yet yielded: the reorder buffer and requests in flight
    num_threads: int  # for `prepare`


class RequestScheduler(Generic[P]):
    """Answers requests through `ask`, many at once, and yields the replies in order."""

    def __init__(
        self,
        bounds: Bounds,
        *,
        prepare: Callable[[Request], P],
        ask: Ask[P],
        loop: EventLoopThread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bounds, self._prepare, self._ask, self._loop = bounds, prepare, ask, loop
        self._max_drawn = bounds.max_in_flight + bounds.num_ahead
        self._resume_below = self._max_drawn - bounds.num_ahead // 2
        self._is_throttled = False
        self._pool = ThreadPoolExecutor(bounds.num_threads, thread_name_prefix="prepare")
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._slots = asyncio.Semaphore(bounds.max_in_flight)
        self._calls: set[_Call] = set()
        self._num_drawn = 0  # drawn and not answered
        self._num_in_flight = 0
        self._idle_meter = _IdleMeter(clock)
        self._closed = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        call = _Call(self._lock)
        with self._lock:
            if self._closed:
                raise EngineDiedError("the engine is closed")
            self._calls.add(call)
        feeder = threading.Thread(target=self._feed_requests, args=(call, iter(requests)), name="feeder", daemon=True)
        feeder.start()
        try:
            yield from self._yield_replies(call)
        finally:
            self._end_call(call)
            feeder.join(timeout=1)  # if the caller's iterator blocks, the thread ends with it

    def waiting(self) -> float | None:
        with self._lock:
            return self._idle_meter.take_share(busy=bool(self._calls))

    def close(self) -> None:
        """Ends all calls. Idempotent."""
        with self._lock:
            self._closed = True
            for call in self._calls:
                call.fail(EngineDiedError("the engine was closed during a request"))
            self._has_room.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _yield_replies(self, call: _Call) -> Iterator[Reply]:
        while (reply := call.take_reply()) is not None:
            with self._lock:
                if call.num_pending == self._bounds.max_unordered - 1:
                    self._has_room.notify_all()
            yield reply

    def _end_call(self, call: _Call) -> None:
        with self._lock:
            call.is_stopped = True
            self._calls.discard(call)
            self._has_room.notify_all()
            self._record_idleness()
        self._loop.call_soon(call.cancel)

    # The feeder's thread.

    def _feed_requests(self, call: _Call, requests: Iterator[Request]) -> None:
        error: Exception | None = None
        try:
            while self._wait_for_room(call) and (request := next(requests, None)) is not None:
                self._start_request(call, request)
        except Exception as raised:  # from the caller's iterator: re-raised in the caller's thread
            error = raised
        with self._lock:
            self._num_drawn -= call.is_drawing
            self._has_room.notify_all()
            call.end_input(error)
            self._record_idleness()

    def _wait_for_room(self, call: _Call) -> bool:
        """Waits until one more request may be drawn. Returns False when the call is over."""
        with self._lock:
            self._has_room.wait_for(
                lambda: call.is_over or (not self._is_full() and call.num_pending < self._bounds.max_unordered)
            )
            if call.is_over:
                return False
            self._num_drawn += 1
            call.is_drawing = True
            self._record_idleness()
        return True

    def _is_full(self) -> bool:
        """Stays full until there is room for several requests: waking the feeders costs more than drawing one."""
        if self._num_drawn >= self._max_drawn:
            self._is_throttled = True
        elif self._num_drawn < self._resume_below:
            self._is_throttled = False
        return self._is_throttled

    def _start_request(self, call: _Call, request: Request) -> None:
        with self._lock:
            n = call.count_request()

        def prepare() -> P:
            if call.is_over:
                raise BadRequestError("the call is over")
            return self._prepare(request)

        def start_answer(prepared: Future[P]) -> None:
            call.spawn(self._answer(request, prepared), lambda task: self._finish_request(call, n, task))

        # The loop is woken once per request, when it can be sent.
        self._pool.submit(prepare).add_done_callback(lambda done: self._loop.call_soon(partial(start_answer, done)))

    # The loop's thread.

    def _finish_request(self, call: _Call, n: int, task: asyncio.Task[Reply]) -> None:
        with self._lock:
            self._num_drawn -= 1
            if not task.cancelled():
                call.store_result(n, task)
            if not self._is_full() or call.is_over:
                self._has_room.notify_all()
            self._record_idleness()

    async def _answer(self, request: Request, prepared: Future[P]) -> Reply:
        try:
            prompt = prepared.result()
        except BadRequestError as error:
            return finish_attempt(request, Reply(error=str(error)), 1)[0]
        async with self._slots:
            self._count_in_flight(+1)
            try:
                return await self._run_ladder(request, prompt)
            finally:
                self._count_in_flight(-1)

    def _count_in_flight(self, change: int) -> None:
        with self._lock:
            self._num_in_flight += change
            self._record_idleness()

    async def _run_ladder(self, request: Request, prompt: P) -> Reply:
        """Retries up the ladder without giving up its slot, so that no tail of retries forms."""
        attempt, is_final = 0, False
        while not is_final:
            attempt += 1
            try:
                reply = await self._ask_once(prompt, request, attempt)
            except BadRequestError as error:
                reply = Reply(error=str(error))
            reply, is_final = finish_attempt(request, reply, attempt)
        return reply

    async def _ask_once(self, prompt: P, request: Request, attempt: int) -> Reply:
        """Makes one attempt; if the engine stopped a text that is not a loop for the request, again to its end."""
        sampling, seed = request.ladder[attempt - 1], request.seed + attempt - 1
        reply = await self._ask(prompt, request, sampling, seed)
        if request.find_loop is find_no_loop or is_wanted_stop(request, reply):
            return reply
        return await self._ask(prompt, replace(request, find_loop=find_no_loop), sampling, seed)

    def _record_idleness(self) -> None:
        """Records the share of the engine that is idle because the next requests are not ready."""
        is_starved = bool(self._calls) and self._num_drawn > self._num_in_flight
        idle = max(0.0, 1 - self._num_in_flight / self._bounds.saturation)
        self._idle_meter.record(starved=idle if is_starved else 0.0, busy=bool(self._calls))


class ScheduledEngine:
    """An engine whose requests all go through a scheduler."""

    _scheduler: RequestScheduler[Any]

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return self._scheduler.generate(requests)

    def waiting(self) -> float | None:
        return self._scheduler.waiting()


class _Call:
    """One call of `generate`: its replies, the next one to yield, and its end. Guarded by the scheduler's lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._changed = threading.Condition(lock)
        self._replies: dict[int, Reply] = {}
        self._num_started = 0
        self._num_yielded = 0
        self._input_ended = False
        self._error: BaseException | None = None  # raised at once
        self._input_error: Exception | None = None  # raised after all replies
        self._tasks: set[asyncio.Task[Reply]] = set()  # used on the loop only
        self.is_drawing = False
        self.is_stopped = False

    @property
    def is_over(self) -> bool:
        return self.is_stopped or self._error is not None

    @property
    def num_pending(self) -> int:
        return self._num_started - self._num_yielded

    def count_request(self) -> int:
        self.is_drawing = False
        self._num_started += 1
        return self._num_started - 1

    def end_input(self, error: Exception | None) -> None:
        self.is_drawing = False
        self._input_ended, self._input_error = True, error
        self._changed.notify_all()

    def store_result(self, n: int, task: asyncio.Task[Reply]) -> None:
        if error := task.exception():  # the engine died, or `accept` raised: the call cannot continue
            self.fail(error)
            return
        self._replies[n] = task.result()
        if n == self._num_yielded:
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def take_reply(self) -> Reply | None:
        """Waits for the next reply. Returns None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_yielded in self._replies or self._error or self._is_complete)
            if self._num_yielded in self._replies:
                self._num_yielded += 1
                return self._replies.pop(self._num_yielded - 1)
            if error := self._error or self._input_error:
                raise error
            return None

    @property
    def _is_complete(self) -> bool:
        return self._input_ended and self._num_yielded == self._num_started

    def spawn(self, work: Coroutine[Any, Any, Reply], done: Callable[[asyncio.Task[Reply]], None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        if self.is_stopped:
            task.cancel()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


class _IdleMeter:
    """The mean idle share of the engine over the time in which any call was active."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._starved, self._busy = 0.0, False
        self._starved_seconds = self._busy_seconds = 0.0

    def record(self, *, starved: float, busy: bool) -> None:
        now = self._clock()
        self._starved_seconds += (now - self._since) * self._starved
        self._busy_seconds += (now - self._since) * self._busy
        self._since, self._starved, self._busy = now, starved, busy

    def take_share(self, *, busy: bool) -> float | None:
        self.record(starved=self._starved, busy=busy)
        share = self._starved_seconds / self._busy_seconds if self._busy_seconds else None
        self._starved_seconds = self._busy_seconds = 0.0
        return share


class EventLoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Schedules a callback on the loop. Ignored when the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for its result in the caller's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Runs `last`, cancels the remaining tasks and ends the thread. Idempotent."""
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
    """A small cache that computes each value once: concurrent callers of one key wait for the first.

    A failure is raised to those who wait for it and is not cached: the next caller tries again.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, Future[T]] = OrderedDict()

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            if (pending := self._results.get(key)) is None:
                future = self._results[key] = Future()
                while len(self._results) > self._max_size:
                    self._results.popitem(last=False)
        if pending is not None:
            return pending.result()
        try:
            future.set_result(compute())
        except BaseException as error:  # waiting callers must receive it too; re-raised
            with self._lock:
                if self._results.get(key) is future:
                    del self._results[key]
            future.set_exception(error)
            raise
        return future.result()
