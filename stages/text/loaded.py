"""Scorers and finders as a section of run.toml loads them: a module, its checked settings, the engines that it uses.

Does not know what the module is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.sections import Plugin, Run, stamped
from stages.text.prompts import engine_slice


@dataclass(frozen=True, kw_only=True)
class LoadedPlugin:
    """A plugin with its settings."""

    kind: str
    module: ModuleType
    settings: Any
    engine_names: Mapping[str, str]  # key of run.toml -> name in [engines]

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(self.engine_names.values())

    def slice(self, run: Run, *, field: str) -> dict[str, Any]:
        """The part of the fingerprint that decides its results; the seed belongs to it only if a model is used.

        Args:
            run: the run.
            field: the section, for messages.

        Raises:
            ConfigError: run.toml has no engine of that name.
        """
        own = {"kind": self.kind, "version": getattr(self.module, "VERSION", 1), **stamped(self.settings)}
        if not self.engine_names:
            return own
        engines = [engine_slice(run, engine, field=f"{field}.{key}") for key, engine in self.engine_names.items()]
        return {**own, "seed": run.seed, "engines": engines}


def prepare_plugin(plugin: Plugin, *, run: Path | None, field: str) -> LoadedPlugin:
    """Loads what the settings of a section name.

    Args:
        plugin: its kind and config.
        run: the folder whose files override those that ship.
        field: the section, for messages.

    Raises:
        ConfigError: something that the section names is missing or wrong.
    """
    module, settings = plugin.module, plugin.config
    if hasattr(module, "prepare"):
        settings = module.prepare(settings, run=run, field=field)
    engine_names = module.engines(settings) if hasattr(module, "engines") else {}
    return LoadedPlugin(kind=plugin.kind, module=module, settings=settings, engine_names=engine_names)
