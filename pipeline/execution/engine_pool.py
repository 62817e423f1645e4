"""The engines of a run by name, opened on first use and closed when no longer needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.progress import report_waiting
from pipeline.sections import Plugin


class EnginePool(Mapping[str, Engine]):
    """The engines of run.toml by name, opened on first use."""

    def __init__(self, plugins: Mapping[str, Plugin], *, stop: threading.Event) -> None:
        """`stop` is set once the command is asked to stop."""
        self._plugins, self._open, self._stop = plugins, dict[str, Engine](), stop
        self._lock = threading.Lock()
        self.is_loading = False

    def __getitem__(self, name: str) -> Engine:
        with self._lock:
            if name not in self._open:
                plugin = self._plugins[name]
                try:
                    model = getattr(plugin.config, "model_name", "")
                    with report_waiting(f"loading {name} ({plugin.kind} {model})"):
                        self.is_loading = True
                        engine = plugin.module.open(plugin.config)
                    if heed := getattr(engine, "heed", None):
                        heed(self._stop)
                    self._open[name] = engine
                except ConfigError as error:  # an engine knows its keys, but not its name in run.toml
                    raise ConfigError(plugin.where, str(error)) from error
                finally:
                    self.is_loading = False
            return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plugins)

    def __len__(self) -> int:
        return len(self._plugins)

    def close_all_but(self, names: Iterable[str]) -> None:
        """Closes the other engines, so that captioner and judge are never on one GPU together."""
        with self._lock:
            for name in set(self._open) - set(names):
                self._open.pop(name).close()

    def waiting(self, names: Iterable[str]) -> float | None:
        """The largest idle share, [0, 1], among these engines since the previous call; None if unknown."""
        shares = [self._open[name].waiting() for name in names if name in self._open]
        return max((share for share in shares if share is not None), default=None)
