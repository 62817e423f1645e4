"""Further rounds of a training: the model that a round made captions again, gets new rubrics, and is trained on.

A rubric lists what a student missed; once it is trained, it misses something else. Each further round is a run of its
own in `rounds/N` of the run's folder, with the sections of the run and the model of the round before in place of the
one that the training began with. Tables that do not depend on that model are linked there, and all others are made
there, so that each round keeps its own. It does not know how a table or a model is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import add_inputs, list_passes
from pipeline.execution.passes import Pass
from pipeline.sections import Plugin, ResolvedPath, Run
from pipeline.storage.layout import PACKED
from stages.training.provenance import digest_weights
from stages.training.settings import TrainConfig

FOLDER = "rounds"


def check_rounds(run: Run, config: TrainConfig, reads: Sequence[str], *, generates: bool) -> None:
    """
    Raises:
        ConfigError: there would be further rounds, and nothing would be different in them.
    """
    if config.rounds == 1:
        return
    field = f"{run.file}: train.rounds"
    if not generates:
        raise ConfigError(field, f"is {config.rounds}; only a method that learns from its own answers has rounds: grpo")
    if not _find_affected(run, config, reads):
        raise ConfigError(
            field,
            f"is {config.rounds}, but no table that the training reads depends on train.model = {config.model!r}; name"
            " it as the model of the engine that captions for the student of the rubrics",
        )


def prepare_next_round(run: Run, model: Path, reads: Sequence[str]) -> Run | None:
    """The run of the round after `run`, whose folder has what needs not be made again; None after the last round.

    Args:
        model: the folder of the model that `run` made.
        reads: the folders of the tables that the training reads.
    """
    config: TrainConfig = run.sections["train"][""]
    if config.rounds == 1:
        return None
    base, number = _find_place(run)
    folder = base / FOLDER / str(number + 1)
    affected = {p.folder for p in _find_affected(run, config, reads)}
    shared = [p.folder for p in _list_needed(run, reads) if p.folder not in affected]
    share_tables(folder, run.folder, ["plan.parquet", *shared])
    made = ResolvedPath(str(model), given=f"round {number}: {digest_weights(str(model))[:12]}")
    trained = replace(config, model=made, seed=config.seed + 1, rounds=config.rounds - 1)
    engines = {
        name: replace(engine, config=replace(engine.config, model=made)) if _uses(engine, config) else engine
        for name, engine in run.engines.items()
    }
    sections: Mapping[str, Mapping[str, object]] = {**run.sections, "train": {"": trained}}
    return replace(run, folder=folder, engines=engines, sections=sections)


def _find_place(run: Run) -> tuple[Path, int]:
    """The folder of the first round's run, and the number of this round."""
    if run.folder.parent.name == FOLDER:
        return run.folder.parent.parent, int(run.folder.name)
    return run.folder, 1


def _find_affected(run: Run, config: TrainConfig, reads: Sequence[str]) -> list[Pass]:
    """The passes that the training reads from, directly or not, and that the trained model makes, directly or not."""
    engines = {name for name, engine in run.engines.items() if _uses(engine, config)}
    affected: dict[str, Pass] = {}
    for p in _list_needed(run, reads):
        if engines.intersection(p.engines) or affected.keys() & set(p.depends_on):
            affected[p.folder] = p
    return list(affected.values())


def _list_needed(run: Run, reads: Sequence[str]) -> list[Pass]:
    passes = list_passes(run)
    return add_inputs(passes, [p for p in passes if p.folder in reads])


def _uses(engine: Plugin, config: TrainConfig) -> bool:
    return getattr(engine.config, "model", None) == config.model


def share_tables(folder: Path, source: Path, names: Sequence[str]) -> None:
    """Gives a run the tables, plan and packed images of another.

    Args:
        folder: of the run that gets them.
        source: the other run's folder.
        names: files, and folders of tables at any depth, below it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (source / name for name in names):
        for file in [path] if path.is_file() else path.rglob("*.parquet"):
            _share_file(folder / file.relative_to(source), file)
    if not (folder / PACKED).is_symlink() and (source / PACKED).is_dir():
        (folder / PACKED).symlink_to(os.path.relpath(source / PACKED, folder))


def _share_file(path: Path, source: Path) -> None:
    """A hard link: the folder is a whole run, also for those that may read nothing outside it. Tables never change."""
    if path.exists() and path.samefile(source):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, path)
