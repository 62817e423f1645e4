"""The provenance of a model, and whether a model and checkpoints in the run are still current."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from pipeline.errors import RefusedError
from pipeline.execution.states import describe_changes
from pipeline.records import Step
from pipeline.sections import Run
from pipeline.storage import tables
from stages.training import trainer
from stages.training.curve import CARD, Curve
from stages.training.methods import Method
from stages.training.settings import TrainConfig, stamp_config

VERSION = 2


def build_provenance(run: Run, config: TrainConfig, method: Method) -> tables.Provenance:
    """All that decides the model: the settings, the prompts and rewards, the initial weights and the tables."""
    inputs = {folder: _digest_tables(run.folder / folder) for folder in method.list_tables()}
    settings = {**stamp_config(config), **method.slice(), "weights": digest_weights(str(config.model))}
    return tables.Provenance(stage="train", name="", version=VERSION, slice=settings, inputs=inputs)


def _digest_tables(folder: Path) -> str:
    footers = (tables.read_footer(file) for file in sorted(folder.glob("*.parquet")))
    return hashlib.sha256("".join(footer.digest for footer in footers if footer).encode()).hexdigest()


def digest_weights(model: str) -> str:
    """The digest of a folder's weights. A model on the Hub is identified by its name, so its digest is empty."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_done(run: Run, config: TrainConfig, provenance: tables.Provenance) -> bool:
    """True if the model is there, trained from the same by all of its steps."""
    path = Curve.path(run.folder)
    if not (run.folder / config.output / CARD).exists() or not path.exists():
        return False
    footer = tables.read_footer(path)
    current = footer is not None and footer.fingerprint == provenance.fingerprint
    return current and max((point.step for point in tables.read_rows(path, Step)), default=0) >= config.steps


def resolve_stale(run: Run, config: TrainConfig, current: tables.Provenance, stale: str) -> tables.Provenance:
    """The provenance to train by: that of existing checkpoints where they are kept, else the current one.

    Args:
        stale: what to do with checkpoints of another provenance: "stop", "redo" or "keep".

    Raises:
        RefusedError: there are such checkpoints, and `stale` is "stop".
    """
    path, checkpoints = Curve.path(run.folder), run.folder / trainer.FOLDER
    before = tables.read_footer(path) if path.exists() else None
    if before is None and trainer.find_checkpoint(checkpoints) is None:
        return current
    if stale == "keep":
        return current if before is None else before.provenance
    if before is not None and before.fingerprint == current.fingerprint:
        return current
    if stale == "redo":
        shutil.rmtree(checkpoints, ignore_errors=True)
        (run.folder / config.output / CARD).unlink(missing_ok=True)  # or the old model would count as the new one
        path.unlink(missing_ok=True)
        return current
    unknown = f"their provenance is unknown: {path} is missing"
    reason = unknown if before is None else _explain(before.provenance, current)
    raise RefusedError(
        f"{run.file}: train: the checkpoints in {checkpoints} are stale: {reason};"
        " use --stale redo to train from the start, --stale keep to resume from them"
    )


def _explain(before: tables.Provenance, current: tables.Provenance) -> str:
    inputs = sorted({**before.inputs, **current.inputs})
    changed = [name for name in inputs if before.inputs.get(name) != current.inputs.get(name)]
    return "; ".join([*describe_changes(before, current), *(f"{name} has other rows" for name in changed)])
