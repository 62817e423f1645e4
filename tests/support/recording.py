"""A user-defined engine, `kind = "tests.support.recording"`: answers like echo and logs each call."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import key
from pipeline.engines import Engine, Reply, Request, echo


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = key(help="the engine's name in the log", stamp=False)
    record: str = key(help="the log file", stamp=False)
    overlap: int = key(1, "calls of generate that must run at once before any of them answers", stamp=False)


def open(config: Config) -> Engine:  # noqa: A001
    return Recording(config)


class Recording(echo.Echo):
    def __init__(self, settings: Config) -> None:
        super().__init__(echo.Config())
        self._settings = settings
        self._barrier = threading.Barrier(settings.overlap)
        self._log_event("open")

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        self._barrier.wait(timeout=60)
        self._log_event("generate")
        yield from super().generate(requests)

    def close(self) -> None:
        self._log_event("close")

    def _log_event(self, event: str) -> None:
        with Path(self._settings.record).open("a") as file:
            file.write(f"{event} {self._settings.name}\n")
