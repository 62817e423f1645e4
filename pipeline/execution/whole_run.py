"""Stages that make one product from all shards at once, such as a trained model.

Such a stage is a module of stages/ with

- `reads(run: Run) -> Sequence[str]`: the folders of the tables that must be done before;
- `make(run: Run, engines: Mapping[str, Engine], *, stale: Stale, stop: Event) -> Path`: makes the product, or finds it
  done, and returns its path. It ends early with StoppedError when `stop` is set, and a later call resumes.

Only the stage knows what the product is.
"""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import ModuleType

from pipeline import plugins
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.run_state import RunState
from pipeline.execution.signals import stop_on_signal


def load_stage(name: str) -> ModuleType | None:
    """The stage of this name, when it works on the whole run; None for every other name."""
    module = plugins.load("stages", name) if name in plugins.list_names("stages") else None
    return module if hasattr(module, "reads") and hasattr(module, "make") else None


def load_command(name: str) -> ModuleType:
    """The package of stages/ that is the command `recap NAME`.

    It has `run_command(run: Run, **options) -> Iterator[str]`, which yields the lines to print.
    """
    return plugins.load("stages", name)


def make_product(stage: ModuleType, state: RunState) -> Path:
    """Makes the stage's product and returns its path.

    Raises:
        UserError: a table that it reads is not done, or the stage refuses.
        StoppedError: a signal came; the same call resumes.
    """
    state.check_done(stage.reads(state.run))
    engines, stop = EnginePool(state.run.engines), Event()
    try:
        with stop_on_signal(stop):
            path: Path = stage.make(state.run, engines, stale=state.stale, stop=stop)
    finally:
        engines.close_all_but(())
    return path
