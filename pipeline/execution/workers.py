"""Decides how one command shares a node: worker processes, each with cores and devices of its own.

It knows processes and pipes; what a task is, the job says. A worker that is killed fails its tasks, and nothing waits
for it; workers whose parent is gone stop by themselves.
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
CONTEXT = multiprocessing.get_context("spawn")  # the parent has threads: a fork could inherit a held lock


class Job(Protocol):
    """What a worker does, made in its process."""

    def do(self, task: Any, tell: Callable[[Any], None]) -> Any:
        """Does one task, several at a time in threads; what it tells meanwhile is heard by who gave it."""

    def stop(self) -> None:
        """Asks what runs to end early."""

    def close(self) -> None:
        """Gives back what is held open, at the end."""


@dataclass(frozen=True, kw_only=True)
class NodeShare:
    """What of the node is one worker's."""

    cores: tuple[int, ...] = ()  # none: whichever the system gives it
    devices: tuple[str, ...] = ()  # by the names that CUDA_VISIBLE_DEVICES has for them; none: as they are

    def take(self) -> None:
        """In the worker, before anything looks at either."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        if self.devices:
            os.environ[VISIBLE] = ",".join(self.devices)


def divide_node(num: int, *, cores: Sequence[int], devices: Sequence[str]) -> list[NodeShare]:
    """The node in `num` contiguous parts; what there are too few of is not divided.

    >>> [share.devices for share in shares(2, cores=[], devices=["4", "5", "6", "7"])]
    [('4', '5'), ('6', '7')]
    """

    def part(n: int, all: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(all[n * len(all) // num : (n + 1) * len(all) // num]) if len(all) >= num else ()

    return [NodeShare(cores=part(n, cores), devices=part(n, devices)) for n in range(num)]


def visible_devices() -> list[str]:
    """The GPUs that this process may use; none on a CPU."""
    try:
        import torch
    except ImportError:
        return []
    return name_devices(torch.cuda.device_count(), os.environ.get(VISIBLE))


def name_devices(num: int, given: str | None) -> list[str]:
    """`num` devices by their names: those that the user, or Slurm, gave them; else their numbers.

    >>> named(2, "GPU-5a, GPU-9c"), named(2, None)
    (['GPU-5a', 'GPU-9c'], ['0', '1'])
    """
    names = [str(n) for n in range(num)] if given is None else [name.strip() for name in given.split(",")]
    return names[:num]


class WorkerPool:
    """Workers, each started with its first task.

    Args:
        hire: makes the job in the worker's process; it is pickled.
        shares: one for each worker.
    """

    def __init__(self, hire: Callable[[], Job], divide_node: Sequence[NodeShare]) -> None:
        self._hire, self._shares = hire, divide_node
        self._workers: list[_Worker] = []

    def submit(self, task: Any, *, hear: Callable[[Any], None]) -> Future[Any]:
        """Gives the task to who has least to do. `hear` is called, in another thread, with what the job tells."""
        free = min(self._workers, key=lambda worker: worker.num_tasks, default=None)
        if len(self._workers) < len(self._shares) and (free is None or free.num_tasks):
            free = _Worker(self._hire, self._shares[len(self._workers)])
            self._workers.append(free)
        assert free is not None
        return free.submit(task, hear)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def close(self) -> None:
        """Waits for what runs. Idempotent."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()


class _Worker:
    """A worker, seen from the parent."""

    def __init__(self, hire: Callable[[], Job], share: NodeShare) -> None:
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(theirs, hire, share), name="recap worker")
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._numbers = count()
        self._tasks: dict[int, tuple[Future[Any], Callable[[Any], None]]] = {}
        self._listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._listener.start()

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    def submit(self, task: Any, hear: Callable[[Any], None]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._tasks[number] = future, hear
        if not self._send((number, task)):
            self._settle(number, WorkerDiedError())
        return future

    def stop(self) -> None:
        self._send(STOP)

    def dismiss(self) -> None:
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
                number, final, said = self._connection.recv()
                if final:
                    self._settle(number, said)
                else:
                    self._tasks[number][1](said)
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


def _work(connection: Connection, hire: Callable[[], Job], share: NodeShare) -> None:
    """The worker's process."""
    # Sent to whole process groups when a person or a cluster ends a run; the parent decides, and says so.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    share.take()
    job, sending = hire(), threading.Lock()

    def send(number: int, final: bool, said: Any) -> None:
        with sending, suppress(OSError):  # the parent is gone, and the loop below ends
            connection.send((number, final, said))

    def do(number: int, task: Any) -> None:
        try:
            outcome = job.do(task, lambda news: send(number, False, news))
        except Exception as error:  # of the job, whatever it is: raised again where the task came from
            outcome = _portable(error)
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


def _portable(error: Exception) -> Exception:
    """The error with where it was raised, as another process can read it."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code, which promises no type
        return MachineError(trace)
    return error
