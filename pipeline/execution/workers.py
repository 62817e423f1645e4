"""Worker processes that share a node, each with cores and devices of its own.

This module knows processes and pipes; what a task does, the job knows. When a worker is killed, its tasks fail at once;
when the parent is gone, workers stop by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pipeline.errors import MachineError, WorkerDiedError

VISIBLE = "CUDA_VISIBLE_DEVICES"
STOP = "stop"
CONTEXT = multiprocessing.get_context("spawn")  # the parent has threads: a fork could inherit a locked lock


class WorkerJob(Protocol):
    """The work of a worker, created in its process."""

    def do(self, task: Any, send: Callable[[Any], None]) -> Any:
        """Does one task, several at a time in threads; `send` reports progress to the parent."""

    def stop(self) -> None:
        """Asks running tasks to end early."""

    def close(self) -> None:
        """Releases resources, after the last task."""


@dataclass(frozen=True, kw_only=True)
class NodeShare:
    """The part of the node that one worker uses."""

    cores: tuple[int, ...] = ()  # empty: all
    devices: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: all

    def apply(self) -> None:
        """Restricts this process to the share; called before anything looks at cores or devices."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        if self.devices:
            os.environ[VISIBLE] = ",".join(self.devices)


def divide_node(num: int, *, cores: Sequence[int], devices: Sequence[str]) -> list[NodeShare]:
    """Divides the node into `num` contiguous parts; cores or devices fewer than `num` are shared by all.

    >>> [share.devices for share in shares(2, cores=[], devices=["4", "5", "6", "7"])]
    [('4', '5'), ('6', '7')]
    """

    def take_part(n: int, all: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(all[n * len(all) // num : (n + 1) * len(all) // num]) if len(all) >= num else ()

    return [NodeShare(cores=take_part(n, cores), devices=take_part(n, devices)) for n in range(num)]


def visible_devices() -> list[str]:
    """The GPUs that this process may use; empty on a CPU."""
    try:
        import torch
    except ImportError:
        return []
    return name_devices(torch.cuda.device_count(), os.environ.get(VISIBLE))


def name_devices(num: int, given: str | None) -> list[str]:
    """The names of `num` devices: those in CUDA_VISIBLE_DEVICES (`given`), otherwise their numbers.

    >>> named(2, "GPU-5a, GPU-9c"), named(2, None)
    (['GPU-5a', 'GPU-9c'], ['0', '1'])
    """
    names = [str(n) for n in range(num)] if given is None else [name.strip() for name in given.split(",")]
    return names[:num]


class WorkerPool:
    """A pool of workers, each started with its first task.

    Args:
        make_job: creates the job in the worker's process; it is pickled.
        shares: one for each worker.
    """

    def __init__(self, make_job: Callable[[], WorkerJob], shares: Sequence[NodeShare]) -> None:
        self._make_job, self._shares = make_job, shares
        self._workers: list[_Worker] = []

    def submit(self, task: Any, *, on_progress: Callable[[Any], None]) -> Future[Any]:
        """Gives the task to the worker with the fewest tasks. `on_progress` is called in another thread."""
        free = min(self._workers, key=lambda worker: worker.num_tasks, default=None)
        if len(self._workers) < len(self._shares) and (free is None or free.num_tasks):
            free = _Worker(self._make_job, self._shares[len(self._workers)])
            self._workers.append(free)
        assert free is not None
        return free.submit(task, on_progress)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def shutdown(self) -> None:
        """Waits for running tasks and ends the workers. Idempotent."""
        for worker in self._workers:
            worker.shutdown()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, make_job: Callable[[], WorkerJob], share: NodeShare) -> None:
        self._connection, other_end = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run_worker, args=(other_end, make_job, share), name="recap worker")
        self._process.start()
        other_end.close()
        self._lock = threading.Lock()
        self._numbers = count()
        self._tasks: dict[int, tuple[Future[Any], Callable[[Any], None]]] = {}
        self._listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._listener.start()

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    def submit(self, task: Any, on_progress: Callable[[Any], None]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._tasks[number] = future, on_progress
        if not self._send((number, task)):
            self._settle(number, WorkerDiedError())
        return future

    def stop(self) -> None:
        self._send(STOP)

    def shutdown(self) -> None:
        self._send(None)

    def join(self) -> None:
        self._process.join()
        self._listener.join()

    def kill(self) -> None:
        self._process.kill()

    def _send(self, message: Any) -> bool:
        with suppress(OSError):
            self._connection.send(message)
            return True
        return False

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, is_result, message = self._connection.recv()
                if is_result:
                    self._settle(number, message)
                else:
                    self._tasks[number][1](message)
        for number in list(self._tasks):
            self._settle(number, WorkerDiedError())

    def _settle(self, number: int, outcome: Any) -> None:
        with self._lock:
            future, _ = self._tasks.pop(number, (None, None))
        if future is None:
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _run_worker(connection: Connection, make_job: Callable[[], WorkerJob], share: NodeShare) -> None:
    """The main function of a worker process."""
    # Terminals and clusters signal whole process groups; the parent decides what to do and sends STOP.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    share.apply()
    job, sending = make_job(), threading.Lock()

    def send(number: int, is_result: bool, message: Any) -> None:
        with sending, suppress(OSError):  # if the parent is gone, the loop below ends
            connection.send((number, is_result, message))

    def do(number: int, task: Any) -> None:
        try:
            outcome = job.do(task, lambda progress: send(number, False, progress))
        except Exception as error:  # any error of the job is raised again in the parent
            outcome = _make_portable(error)
        send(number, True, outcome)

    with ThreadPoolExecutor() as pool:
        with suppress(EOFError):
            while (message := connection.recv()) is not None:
                if message == STOP:
                    job.stop()
                else:
                    pool.submit(do, *message)
        job.stop()
    job.close()


def _make_portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or a MachineError if it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code, which may raise anything
        return MachineError(trace)
    return error
