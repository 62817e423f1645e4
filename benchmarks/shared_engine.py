"""An engine kind for benchmarks: it uses an engine that is open already, so that start-up is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.engines import Engine, Reply, Request, vllm

Config = vllm.Config
ENGINES: list[Engine] = []  # the open one


def open(_: Config) -> SharedEngine:  # noqa: A001
    return SharedEngine(ENGINES[0])


class SharedEngine:
    """Another engine, which stays open when this one is closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model, self.revision = engine.model, engine.revision

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return self._engine.generate(requests)

    def waiting(self) -> float | None:
        return self._engine.waiting()

    def close(self) -> None:
        pass
