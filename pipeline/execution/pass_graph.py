"""The passes of a run, ordered so that each comes after those whose tables it reads, and their selection by name."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Pass
from pipeline.sections import OPTIONAL_STAGES, Run

# the stages of `recap run all`, which also makes their inputs
ALL = ("ingest", "curate", "find", "caption", "score", "canary", "filter", "export")


def list_passes(run: Run) -> list[Pass]:
    """Every pass of the run, each after those whose tables it reads.

    Raises:
        ConfigError: a pass reads a table that no pass makes, or passes depend on each other in a circle.
    """
    unused = {stage for stage in OPTIONAL_STAGES if not run.sections[stage]}
    modules = [plugins.load("stages", stage) for stage in plugins.list_stages(run.sections) if stage not in unused]
    passes: list[Pass] = [p for module in modules if hasattr(module, "passes") for p in module.passes(run)]
    by_folder = {p.folder: p for p in passes}
    for p in passes:
        for folder in p.depends_on:
            if folder not in by_folder:
                field = f"{run.file}: {p.stage}.{p.name}"
                raise ConfigError(field, f"reads {folder}/, which no pass of this run makes")
    sorter = TopologicalSorter({p.folder: p.depends_on for p in passes})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(str(run.file), f"passes wait for each other: {' -> '.join(error.args[1])}") from error
    rank = {p.folder: i for i, p in enumerate(passes)}
    return [by_folder[folder] for folder in _sort_folders(sorter, rank)]


def select_passes(passes: list[Pass], name: str) -> list[Pass]:
    """The passes that STAGE, STAGE:NAME, STAGE:NAME:CAPTION or `all` selects, in order.

    Raises:
        UnknownNameError: it selects none; the message lists the choices.
    """
    if name == "all":
        return add_inputs(passes, [p for p in passes if p.stage in ALL])
    parts = name.split(":")
    selected = [p for p in passes if p.title.split(":")[: len(parts)] == parts]
    if not selected:
        titles = sorted({p.stage for p in passes} | {f"{p.stage}:{p.name}" for p in passes if p.name})
        raise UnknownNameError(f"STAGE: {plugins.explain_unknown(name, ['all', *titles])}")
    return selected


def add_inputs(passes: list[Pass], selected: list[Pass]) -> list[Pass]:
    """The selected passes and, before them, all whose tables they read, directly or not."""
    folders = {p.folder for p in selected}
    for p in reversed(passes):
        if p.folder in folders:
            folders.update(p.depends_on)
    return [p for p in passes if p.folder in folders]


def _sort_folders(sorter: TopologicalSorter[str], rank: dict[str, int]) -> Iterator[str]:
    """Sorts topologically; among passes that are ready, the stages' usual order keeps a stage's passes together."""
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        folder = min(ready, key=rank.__getitem__)
        ready.remove(folder)
        sorter.done(folder)
        yield folder
