"""Words that a shell completes: the stages, passes, engines and queries of a run. An unreadable run has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import config
from pipeline.commands.sql import list_queries
from pipeline.errors import UserError
from pipeline.execution.pass_graph import list_passes
from pipeline.sections import Run


def complete(kind: Callable[[Path], Iterator[str]], folder: Path, begun: str) -> list[str]:
    """The words of a kind that begin with what is typed."""
    try:
        return [word for word in dict.fromkeys(kind(folder)) if word.startswith(begun)]
    except (UserError, OSError):
        return []


def complete_passes(folder: Path) -> Iterator[str]:
    yield "all"
    passes = list_passes(config.load(folder))
    yield from (p.stage for p in passes)
    yield from (p.title for p in passes)


def complete_engines(folder: Path) -> Iterator[str]:
    run: Run = config.load(folder)
    yield from run.engines


def complete_queries(_: Path) -> Iterator[str]:
    yield from (name for name, _ in list_queries())
