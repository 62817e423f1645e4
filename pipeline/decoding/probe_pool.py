"""The probe pool: images probed in a few long-lived processes, bounded in time and memory.

A file that crashes or hangs a decoder costs only its own row, and one whose decoder was killed or ran out of memory is
probed again while no other decoder runs. This module knows processes and pipes, not images, which are the business of
`pipeline.decoding.images`. Nothing is pickled, so that a decoder that a file has taken over cannot take over
its parent.
"""

from __future__ import annotations

import errno
import fcntl
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
from dataclasses import asdict, fields, replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from types import TracebackType
from typing import BinaryIO, TypeVar, cast

from pipeline import machine
from pipeline.decoding.images import MAX_MEMORY, Limits, Probe
from pipeline.errors import DecoderStartError

T = TypeVar("T")
R = TypeVar("R")

FIELDS = tuple(field.name for field in fields(Probe))
VALUES = attrgetter(*FIELDS)
NUMBER = struct.Struct("<Q")  # the number of files in a batch, then the size of each in bytes
BATCH_ITEMS = 64
BATCH_BYTES = 1 << 20
PIPE_BYTES = 1 << 20  # room for the next file while one is decoded

# Prefixes of the environment variables that decoders inherit: libraries, locale and memory. Others may hold secrets.
INHERITED = (
    "LD_",
    "DYLD_",
    "NIX_",
    "PYTHON",
    "LANG",
    "LC_",
    "TZ",
    "TMPDIR",
    "MALLOC_",
    "OMP_",
    "OPENBLAS_",
    "RECAP_TEST_",
)

# Exit statuses of decoders that the machine may have ended: its killer of processes, or an allocation that failed.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
OUTSIDE = (-signal.SIGKILL, errno.ENOMEM, *CRASHES)

# Sent to whole process groups when a user or a cluster ends a run; the parent reacts and closes the pipe.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class ProbePool:
    """Probes files in separate processes.

        with ProbePool() as pool:
            for probe in pool.map(files): ...

    Args:
        num_procs: number of processes; None: one per core that this process may use.
        limits: the sizes that are decoded.
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
        max_memory: int = MAX_MEMORY,
        probe: str = "pipeline.decoding.images:probe",
    ) -> None:
        self.num_procs = num_procs or machine.num_cores()
        job = json.dumps(
            {"probe": probe, "limits": asdict(limits or Limits()), "timeout": timeout, "max_memory": max_memory}
        )
        self._timeout, self._max_memory = timeout, max_memory
        self._alone = Lock()
        self._workers = [_Worker(job) for _ in range(self.num_procs)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def map(self, items: Iterable[bytes]) -> Generator[Probe, None, None]:
        """Yields a probe of each item, in order, lazily: at most a few batches of about a mebibyte are drawn ahead.

        May be called from several threads, which share the processes.

        Raises:
            DecoderStartError: the processes cannot be started.
            OutOfMemoryError: there is less memory than a file may need.
        """
        work = map_ahead(_make_batches(items), self._probe_batch, num_threads=self.num_procs, depth=2 * self.num_procs)
        with closing(work) as batches:
            for answers in batches:
                if isinstance(answers, Exception):
                    raise answers
                yield from answers

    def close(self) -> None:
        """Ends the processes. Idempotent. No `map` may be running."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _probe_batch(self, batch: Sequence[bytes]) -> list[Probe]:
        """Probes a batch. If the process dies, probes each file alone, to find the one that kills it."""
        worker = self._idle.get()
        try:
            probes = worker.probe_batch(batch) or [self._probe_file(worker, data) for data in batch]
        finally:
            self._idle.put(worker)
        pairs = zip(batch, probes, strict=True)
        return [self._probe_alone(data) if probe.is_doubtful else probe for data, probe in pairs]

    def _probe_file(self, worker: _Worker, data: bytes) -> Probe:
        (probe,) = worker.probe_batch([data]) or [self._make_failed_probe(data, worker.exit_status)]
        return probe

    def _probe_alone(self, data: bytes) -> Probe:
        """Probes a file while no other decoder runs; what fails even so, with memory to spare, is the file's fault.

        Raises:
            OutOfMemoryError: it fails again, and less memory is free than it may need.
        """
        with self._alone:  # otherwise two threads could each wait for the other's workers
            workers = [self._idle.get() for _ in range(self.num_procs)]
            try:
                for worker in workers:
                    worker.close()
                probe = self._probe_file(workers[0], data)
            finally:
                for worker in workers:
                    self._idle.put(worker)
        needed = machine.SPARE_BYTES if workers[0].exit_status in CRASHES else self._max_memory
        if probe.is_doubtful:
            machine.check_memory(f"{probe.error} (less is needed with a smaller source.max_pixels)", needed=needed)
        return replace(probe, is_doubtful=False)

    def _make_failed_probe(self, data: bytes, exit_status: int) -> Probe:
        if exit_status == -signal.SIGALRM:
            error = f"decoding took more than {self._timeout:g} s"
        elif exit_status < 0:
            error = f"the decoder crashed (signal {-exit_status})"
        else:
            error = f"the decoder ended (exit status {exit_status})"
        unknown = dict.fromkeys(("format", "width", "height", "orientation", "num_frames"))
        is_doubtful = exit_status in OUTSIDE
        return Probe(
            status="unreadable", error=error, sha256=sha256(data).hexdigest(), is_doubtful=is_doubtful, **unknown
        )


def map_ahead(
    items: Iterable[T], work: Callable[[T], R], *, num_threads: int, depth: int
) -> Generator[R | Exception, None, None]:
    """Yields `work` of each item, in order, up to `depth` items ahead; an exception of `work` is yielded as its result.

    Items are drawn one by one in the consumer's thread, no further than `depth`. The threads end with the iterator,
    also when the consumer closes it early.
    """

    def run_work(item: T) -> R | Exception:
        try:
            return work(item)
        except Exception as error:  # any error of `work` reaches the consumer, in its place
            return error

    pending: deque[Future[R | Exception]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                pending.append(pool.submit(run_work, item))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def raise_errors(results: Iterable[R | Exception]) -> Iterator[R]:
    """Yields results until one is an exception, which is raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


def _make_batches(items: Iterable[bytes]) -> Iterator[list[bytes]]:
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
    """The parent's side of one decoder process, which is started on first use and after each death."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.exit_status = 0  # of the last process that died
        self._process: subprocess.Popen[bytes] | None = None

    def probe_batch(self, batch: Sequence[bytes]) -> list[Probe]:
        """Returns the probes of a batch, which is not empty; an empty list if the process died."""
        process = self._process = self._process or _start_decoder(self.job)
        with suppress(BrokenPipeError):
            _send_batch(cast(BinaryIO, process.stdin), batch)
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
        self.exit_status = _wait_for_exit(process)


def _start_decoder(job: str) -> subprocess.Popen[bytes]:
    """Starts a new interpreter, not a fork: the parent may have threads, a GPU and much memory."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from pipeline.decoding.probe_pool import main; main()", job],
        bufsize=1 << 16,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**{name: value for name, value in os.environ.items() if name.startswith(INHERITED)}, "PYTHONPATH": path},
    )
    if cast(BinaryIO, process.stdout).readline() != b"ready\n":
        raise DecoderStartError(f"{sys.executable} did not start a decoder: exit status {_wait_for_exit(process)}")
    with suppress(OSError, AttributeError):  # pipe sizes may be limited, and only Linux has them
        fcntl.fcntl(cast(BinaryIO, process.stdin), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def _wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _send_batch(pipe: BinaryIO, batch: Sequence[bytes]) -> None:
    pipe.write(NUMBER.pack(len(batch)))
    for data in batch:
        pipe.write(NUMBER.pack(len(data)))
        pipe.write(data)
    pipe.flush()


def main() -> None:
    """Runs a decoder process: reads batches of files from standard input and writes a line of JSON for each."""
    job = json.loads(sys.argv[1])
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb", 1 << 16), os.fdopen(os.dup(1), "wb", 0)
    probe = partial(_load_probe(job["probe"]), limits=Limits(**job["limits"]))
    _limit_memory(job["max_memory"])
    replies.write(b"ready\n")
    _silence_output()
    try:
        while header := requests.read(NUMBER.size):
            rows = []
            for _ in range(*NUMBER.unpack(header)):
                data = requests.read(*NUMBER.unpack(requests.read(NUMBER.size)))
                rows.append(_probe_in_time(probe, data, job["timeout"]))
            replies.write(json.dumps(rows).encode() + b"\n")
    except BrokenPipeError:  # the parent is gone
        pass
    except MemoryError:  # before or after the file was decoded
        sys.exit(errno.ENOMEM)


def _probe_in_time(probe: Callable[[bytes], Probe], data: bytes, timeout: float) -> tuple[object, ...]:
    """Has the kernel end the process if it takes too long: no Python runs while a C library hangs."""
    signal.setitimer(signal.ITIMER_REAL, timeout)
    result = probe(data)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return VALUES(result)


def _load_probe(name: str) -> Callable[..., Probe]:
    from PIL import AvifImagePlugin

    from pipeline.decoding import formats

    formats.import_readers()  # imported before memory is limited
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is already a process per core
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module, _, function = name.partition(":")
    return cast(Callable[..., Probe], getattr(import_module(module), function))


def _limit_memory(num_bytes: int) -> None:
    import resource

    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    with suppress(ValueError, OSError):  # a lower limit is set, or the system has no limits
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, resource.RLIM_INFINITY))


def _silence_output() -> None:
    """C libraries print warnings about corrupt files."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
