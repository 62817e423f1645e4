"""Decides how images are decoded out of harm's way: in a few long-lived processes, bounded in time and memory.

A file that crashes or hangs a decoder costs its own row, nothing else. This module knows processes and pipes; what a
file is, `pipeline.decoding.images` says. Nothing is pickled, for a decoder that a file has taken over must not
take its parent.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, fields
from functools import partial
from hashlib import sha256
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from queue import LifoQueue
from types import TracebackType
from typing import BinaryIO, TypeVar, cast

from pipeline.decoding.images import Limits, Probe
from pipeline.errors import DecoderStartError
from pipeline.machine import num_cores

T = TypeVar("T")
R = TypeVar("R")

FIELDS = tuple(field.name for field in fields(Probe))
VALUES = attrgetter(*FIELDS)
NUMBER = struct.Struct("<Q")  # of the files in a batch, then of the bytes of each before it
BATCH_ITEMS = 64
BATCH_BYTES = 1 << 20
PIPE_BYTES = 1 << 20  # the next file waits in the pipe while one is decoded

# How the environment variables begin that a decoder is given: how libraries are found, text is written, memory is had.
# Keys are in the others.
GIVEN = ("LD_", "DYLD_", "NIX_", "PYTHON", "LANG", "LC_", "TZ", "TMPDIR", "MALLOC_", "OMP_", "OPENBLAS_", "RECAP_TEST_")

# Sent to whole process groups when a person or a cluster ends a run; the parent decides, and then closes the pipe.
NOT_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class ProbePool:
    """Processes that probe files.

        with ProbePool() as pool:
            for found in pool.map(files): ...

    Args:
        num_procs: how many; as many as this process may use cores when None.
        limits: what is decoded at all.
        timeout: seconds for one file.
        max_memory: bytes of address space for one file.
        probe: "module:name" of a function with the signature of `pipeline.decoding.images.probe`.
    """

    def __init__(
        self,
        *,
        num_procs: int | None = None,
        limits: Limits | None = None,
        timeout: float = 60.0,
        max_memory: int = 4 << 30,
        probe: str = "pipeline.decoding.images:probe",
    ) -> None:
        self.num_procs = num_procs or num_cores()
        job = json.dumps(
            {"probe": probe, "limits": asdict(limits or Limits()), "timeout": timeout, "max_memory": max_memory}
        )
        self._timeout = timeout
        self._workers = [_Worker(job) for _ in range(self.num_procs)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def map(self, items: Iterable[bytes]) -> Generator[Probe, None, None]:
        """A probe of each item, in order, lazily: at most a few batches of about a mebibyte are drawn ahead.

        May be called from several threads; they share the processes.

        Raises:
            DecoderStartError: the processes cannot be started.
        """
        work = map_ahead(_batches(items), self._ask, num_threads=self.num_procs, depth=2 * self.num_procs)
        with closing(work) as batches:
            for answers in batches:
                if isinstance(answers, Exception):
                    raise answers
                yield from answers

    def close(self) -> None:
        """Ends the processes. Idempotent; no `map` may be under way."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, batch: Sequence[bytes]) -> list[Probe]:
        worker = self._idle.get()
        try:
            return self._answers(worker, batch)
        finally:
            self._idle.put(worker)

    def _answers(self, worker: _Worker, batch: Sequence[bytes]) -> list[Probe]:
        """A batch over which a process died is asked again, each file alone: who dies then is guilty."""
        if answers := worker.ask(batch):
            return answers
        return [one for data in batch for one in worker.ask([data]) or [self._guilty(data, worker.exit_status)]]

    def _guilty(self, data: bytes, exit_status: int) -> Probe:
        if exit_status == -signal.SIGALRM:
            error = f"decoding took more than {self._timeout:g} s"
        elif exit_status < 0:
            error = f"the decoder crashed (signal {-exit_status})"
        else:
            error = f"the decoder ended (exit status {exit_status})"
        unknown = dict.fromkeys(("format", "width", "height", "orientation", "num_frames"))
        return Probe(status="unreadable", error=error, sha256=sha256(data).hexdigest(), **unknown)


def map_ahead(
    items: Iterable[T], work: Callable[[T], R], *, num_threads: int, depth: int
) -> Generator[R | Exception, None, None]:
    """`work` of each item, in order, up to `depth` items ahead of the consumer; an exception of `work` is its result.

    `items` are drawn one by one, in the consumer's thread, and only as far as `depth` reaches. The threads end with the
    iterator, also when the consumer stops early and closes it.
    """

    def outcome(item: T) -> R | Exception:
        try:
            return work(item)
        except Exception as error:
            return error

    pending: deque[Future[R | Exception]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                pending.append(pool.submit(outcome, item))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for data in items:
        batch.append(data)
        num_bytes += len(data)
        if len(batch) == BATCH_ITEMS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Worker:
    """The parent's end of one decoder process, started when it is first asked and after each death."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.exit_status = 0  # of the last process that died
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, batch: Sequence[bytes]) -> list[Probe]:
        """The probes of `batch`, which is not empty; none when the process died over it."""
        process = self._process = self._process or _start(self.job)
        with suppress(BrokenPipeError):
            _send(cast(BinaryIO, process.stdin), batch)
        line = cast(BinaryIO, process.stdout).readline()
        if line.endswith(b"\n"):
            return [Probe(**dict(zip(FIELDS, values, strict=True))) for values in json.loads(line)]
        self.close()
        return []

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                cast(BinaryIO, pipe).close()
        self.exit_status = _ended(process)


def _start(job: str) -> subprocess.Popen[bytes]:
    """A new interpreter, not a fork: its parent may have threads, a GPU and much memory."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from pipeline.decoding.probe_pool import main; main()", job],
        bufsize=1 << 16,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**{name: value for name, value in os.environ.items() if name.startswith(GIVEN)}, "PYTHONPATH": path},
    )
    if cast(BinaryIO, process.stdout).readline() != b"ready\n":
        raise DecoderStartError(f"{sys.executable} did not start a decoder: exit status {_ended(process)}")
    _widen(cast(BinaryIO, process.stdin))
    return process


def _widen(pipe: BinaryIO) -> None:
    import fcntl

    with suppress(OSError, AttributeError):  # a user's pipes may be limited, and only Linux has it
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _send(pipe: BinaryIO, batch: Sequence[bytes]) -> None:
    pipe.write(NUMBER.pack(len(batch)))
    for data in batch:
        pipe.write(NUMBER.pack(len(data)))
        pipe.write(data)
    pipe.flush()


def main() -> None:
    """A decoder process: batches of files in by standard input, a line of JSON out for each, until the input ends."""
    job = json.loads(sys.argv[1])
    for number in NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb", 1 << 16), os.fdopen(os.dup(1), "wb", 0)
    probe = partial(_load(job["probe"]), limits=Limits(**job["limits"]))
    _bound_memory(job["max_memory"])
    replies.write(b"ready\n")
    _mute()
    with suppress(BrokenPipeError):  # the parent is gone
        while header := requests.read(NUMBER.size):
            answers = [_bounded(probe, _received(requests), job["timeout"]) for _ in range(*NUMBER.unpack(header))]
            replies.write(json.dumps(answers).encode() + b"\n")


def _received(requests: BinaryIO) -> bytes:
    return requests.read(*NUMBER.unpack(requests.read(NUMBER.size)))


def _bounded(probe: Callable[[bytes], Probe], data: bytes, timeout: float) -> tuple[object, ...]:
    """The kernel itself ends a process that takes too long.

    No Python runs while a C library hangs, and when the parent is gone nobody else would be there to watch.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout)
    found = probe(data)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return VALUES(found)


def _load(name: str) -> Callable[..., Probe]:
    from PIL import AvifImagePlugin

    from pipeline.decoding import formats

    formats.import_readers()  # imported now, so that they are not counted as a file's memory
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is a process per core already
    module, _, function = name.partition(":")
    return cast(Callable[..., Probe], getattr(import_module(module), function))


def _bound_memory(num_bytes: int) -> None:
    import resource

    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    with suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, resource.RLIM_INFINITY))


def _mute() -> None:
    """C libraries print what they think of corrupt files."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
