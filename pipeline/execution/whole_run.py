"""Stages that make one product from all shards at once, such as a trained model.

Such a stage is a module of stages/ with

- `reads(run: Run) -> Sequence[str]`: the folders of the tables that must be done before;
- `make(run: Run, engines: Mapping[str, Engine], *, stale: Stale, stop: Event) -> Path`: makes the product, or finds it
  done, and returns its path. It ends early with StoppedError when `stop` is set, and a later call resumes.

and may have

- `next_run(run: Run, product: Path) -> Run | None`: a further run that begins with the product and ends with one of its
  own, for which all tables that it reads are made first.

Only the stage knows what the product is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event
from types import ModuleType

from pipeline import plugins
from pipeline.errors import MachineError, StoppedError
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.pass_graph import add_inputs
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.execution.signals import stop_on_signal


def load_stage(name: str) -> ModuleType | None:
    """The stage of this name, when it works on the whole run; None for every other name."""
    module = plugins.load("stages", name) if name in plugins.list_names("stages") else None
    return module if hasattr(module, "reads") and hasattr(module, "make") else None


def make_product(stage: ModuleType, state: RunState) -> Path:
    """Makes the stage's product, and those of the runs that follow from it; returns the path of the last.

    Raises:
        UserError: a table that it reads is not done, or the stage refuses.
        MachineError: a table of a run that follows could not be made.
        StoppedError: a signal came; the same call resumes.
    """
    state.check_done(stage.reads(state.run))
    product = _make_one(stage, state)
    while (following := stage.next_run(state.run, product) if hasattr(stage, "next_run") else None) is not None:
        state = RunState(following, stale=state.stale)
        _make_tables(state, stage.reads(following))
        product = _make_one(stage, state)
    return product


def _make_one(stage: ModuleType, state: RunState) -> Path:
    stop = Event()
    engines = EnginePool(state.run.engines, stop=stop)
    try:
        with stop_on_signal(stop):
            path: Path = stage.make(state.run, engines, stale=state.stale, stop=stop)
    finally:
        engines.close_all_but(())
    return path


def _make_tables(state: RunState, folders: Sequence[str]) -> None:
    passes = add_inputs(state.passes, [p for p in state.passes if p.folder in folders])
    outcome = Runner(state).execute(passes)
    if outcome.stopped:
        raise StoppedError
    if outcome.failures:
        title, why = next(iter(outcome.failures.items()))
        raise MachineError(f"{state.run.folder}: {title} failed: {why}")
