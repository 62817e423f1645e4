"""Stopping on signals: the first one asks to stop, a second one insists and ends the process within seconds."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.progress import say

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # signals that ask a run to stop
ECHO = 1.0  # seconds after the first signal in which another counts as the same
GRACE = 3.0  # seconds after a second signal for finished rows to be saved and engines to close
STOPPED = 75  # the exit code of a stopped command, as in pipeline/cli.py


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` on SIGINT, SIGTERM or SIGUSR1; on a second one, raises KeyboardInterrupt and ends the process.

    Slurm signals a whole job, and the job's script passes the signal on, so one request may arrive twice.
    """
    first, insists = math.inf, False

    def on_signal(number: int, _: object) -> None:
        nonlocal first, insists
        if first < math.inf:
            if not insists and time.monotonic() - first > ECHO:
                insists = True
                timer = threading.Timer(GRACE, _end_process)
                timer.daemon = True
                timer.start()
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        stop.set()
        say(f"recap: {signal.Signals(number).name}: finishing what is in flight (repeat to stop at once)")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if insists:
            _end_process()


def _end_process() -> None:
    """Ends this process and its children without the interpreter's clean-up, which waits for threads of engines."""
    for child in multiprocessing.active_children():
        child.kill()
    say("recap: stopped at once; the same command resumes")
    os._exit(STOPPED)
