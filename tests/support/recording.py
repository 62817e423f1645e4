"""A user-defined engine, `kind = "tests.support.recording"`: answers like echo and records each call."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import key
from pipeline.engines import Engine, Reply, Request, echo


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = key(help="what it is called in the record", stamp=False)
    record: str = key(help="the file that it writes to", stamp=False)
    overlap: int = key(1, "calls of generate that must be under way together before any answers", stamp=False)


def open(config: Config) -> Engine:  # noqa: A001
    return Recording(config)


class Recording(echo.Echo):
    def __init__(self, settings: Config) -> None:
        super().__init__(echo.Config())
        self._settings = settings
        self._together = threading.Barrier(settings.overlap)
        self._note("open")

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        self._together.wait(timeout=60)
        self._note("generate")
        yield from super().generate(requests)

    def close(self) -> None:
        self._note("close")

    def _note(self, event: str) -> None:
        with Path(self._settings.record).open("a") as file:
            file.write(f"{event} {self._settings.name}\n")
