"""Stopping on signals: the first one asks to stop, a second one insists."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.progress import say

ECHO = 1.0  # seconds after the first signal in which another counts as the same


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` on SIGINT, SIGTERM or SIGUSR1, and raises KeyboardInterrupt on a second one.

    Slurm signals a whole job, and the job's script passes the signal on, so one request may arrive twice.
    """
    first = math.inf

    def on_signal(number: int, _: object) -> None:
        nonlocal first
        if stop.is_set():
            if time.monotonic() - first > ECHO:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        stop.set()
        say(f"recap: {signal.Signals(number).name}: finishing what is in flight (repeat to stop at once)")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
