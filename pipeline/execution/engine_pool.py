"""The engines of a run by name, opened on first use and closed when no longer needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.sections import Plugin


class EnginePool(Mapping[str, Engine]):
    """The engines of run.toml by name, opened when first asked for."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self._plugins, self._open = plugins, dict[str, Engine]()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Engine:
        with self._lock:
            if name not in self._open:
                plugin = self._plugins[name]
                try:
                    self._open[name] = plugin.module.open(plugin.config)
                except ConfigError as error:  # an engine knows its keys, not its name
                    raise ConfigError(plugin.where, str(error)) from error
            return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plugins)

    def __len__(self) -> int:
        return len(self._plugins)

    def close_all_but(self, names: Iterable[str]) -> None:
        """So that the captioner and the judge are never on one GPU by accident."""
        with self._lock:
            for name in set(self._open) - set(names):
                self._open.pop(name).close()

    def waiting(self, names: Iterable[str]) -> float | None:
        shares = [self._open[name].waiting() for name in names if name in self._open]
        known = [share for share in shares if share is not None]
        return max(known) if known else None
