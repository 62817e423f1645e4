"""Decides what work a run has: its passes, each making one table, in an order in which every pass finds its inputs.

A stage is a module of stages/ with

- `passes(run: config.Run) -> Iterable[Pass]`: what there is to do, from its sections of run.toml;
- `Config`, and `NAMED = True` when its section holds named passes, where it has a section at all.

A pass carries the stage's two functions: `inputs` says from a shard's tables what is to be done, one input for each
row; `work` turns inputs into rows, one each, in order. Neither knows of paths, resumption or other shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Protocol

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Record
from pipeline.sections import Run

if TYPE_CHECKING:
    from pipeline.execution.shard import Shard
    from pipeline.storage.payloads import Payload

ALL = ("ingest", "caption", "score", "filter", "export")  # what `recap run all` runs, with all that they read


class Input(Protocol):
    """What one row is made from."""

    @property
    def id(self) -> tuple[str | int, ...]:
        """The id of the row that will come of it."""


Work = Callable[[Iterator[Any], Mapping[str, Engine]], Iterator[Any]]


def no_payload(_: Shard) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One table to make, shard by shard, and all that decides its rows."""

    stage: str
    name: str = ""  # NAME in run.toml; "" where the stage has a single pass
    caption: str = ""  # for scores: the caption pass that is scored
    folder: str  # where its tables lie in the run
    reads: tuple[str, ...] = ()  # folders of the tables it reads; ingest reads the plan
    engines: tuple[str, ...] = ()  # names in [engines] that it asks
    version: int  # of the stage; raised when equal inputs give other rows
    slice: Mapping[str, Any]  # JSON values: the words and numbers that decide its rows
    record: type[Record]
    max_error_share: float  # [0, 1]
    inputs: Callable[[Shard], Iterator[Any]] = field(repr=False)
    work: Work = field(repr=False)
    payload: Callable[[Shard], Payload | None] = field(default=no_payload, repr=False)  # files beside the table
    finish: Callable[[Run, bool], None] | None = field(default=None, repr=False)  # of a whole table; True: some is new
    close: Callable[[], None] | None = field(default=None, repr=False)  # gives back what its work holds open

    @property
    def has_payload(self) -> bool:
        """Whether files stand beside its table; then a shard is made as a whole, or not."""
        return self.payload is not no_payload

    @property
    def title(self) -> str:
        """As people write it: STAGE, STAGE:NAME, or STAGE:NAME:CAPTION."""
        return ":".join(part for part in (self.stage, self.name, self.caption) if part)


def list_passes(run: Run) -> list[Pass]:
    """Every pass of the run, each after those whose tables it reads.

    Raises:
        ConfigError: a pass reads what no pass makes, or two passes wait for each other.
    """
    passes = [p for stage in plugins.list_stages(run.sections) for p in _passes(stage, run)]
    makers = {p.folder: p for p in passes}
    for p in passes:
        for folder in p.reads:
            if folder not in makers:
                raise ConfigError(
                    f"{run.file}: {p.stage}.{p.name}", f"reads {folder}/, which no pass of this run makes"
                )
    sorter = TopologicalSorter({p.folder: p.reads for p in passes})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(str(run.file), f"passes wait for each other: {' -> '.join(error.args[1])}") from error
    return list(_sorted(sorter, makers, {p.folder: i for i, p in enumerate(passes)}))


def select_passes(passes: list[Pass], what: str) -> list[Pass]:
    """The passes that STAGE, STAGE:NAME, STAGE:NAME:CAPTION or `all` names, in their order.

    Raises:
        UnknownNameError: it names none; the message lists what there is.
    """
    if what == "all":
        return with_inputs(passes, [p for p in passes if p.stage in ALL])
    wanted = what.split(":")
    found = [p for p in passes if [p.stage, p.name, p.caption][: len(wanted)] == wanted]
    if not found:
        titles = sorted({p.stage for p in passes} | {f"{p.stage}:{p.name}" for p in passes if p.name})
        raise UnknownNameError(f"STAGE: {plugins.explain_unknown(what, ['all', *titles])}")
    return found


def with_inputs(passes: list[Pass], wanted: list[Pass]) -> list[Pass]:
    """The wanted passes and all that they read, in order."""
    folders = {p.folder for p in wanted}
    for p in reversed(passes):
        if p.folder in folders:
            folders.update(p.reads)
    return [p for p in passes if p.folder in folders]


def _passes(stage: str, run: Run) -> Iterable[Pass]:
    module = plugins.load("stages", stage)
    found: Iterable[Pass] = module.passes(run) if hasattr(module, "passes") else ()
    return found


def _sorted(sorter: TopologicalSorter[str], makers: dict[str, Pass], rank: dict[str, int]) -> Iterator[Pass]:
    """Ready passes in the stages' usual order, so that a stage's passes stay together where they can."""
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        folder = min(ready, key=rank.__getitem__)
        ready.remove(folder)
        sorter.done(folder)
        yield makers[folder]
