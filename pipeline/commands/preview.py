"""Decides what a trial is: a few images through one pass and all that it reads, shown, and nothing left behind."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline.errors import MachineError, UserError
from pipeline.execution.passes import Pass, list_passes, select_passes, with_inputs
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.execution.shard import Shard
from pipeline.records import Caption, Image, ImageRubric, Piece, Score
from pipeline.sections import Run
from pipeline.storage.plan import assign_shards
from pipeline.storage.tables import Provenance, write_rows

INDENT = "    "
NUM_FILES = 4  # that a trial opens where a file holds many images
MAX_LISTED = 1000  # files of the corpus that it looks up for them


def preview_passes(run: Run, what: str, *, num_images: int) -> Iterator[str]:
    """Runs the passes that `what` names on the first images of the corpus; yields what came, image by image.

    Raises:
        UserError: `what` names no pass that writes captions, rubrics or scores, or something failed.
    """
    for p in select_passes(list_passes(run), what):
        if p.record not in (Caption, ImageRubric, Score):
            raise UserError(f"STAGE: `recap try` shows captions, rubrics and scores; {p.title} makes none of them")
    with tempfile.TemporaryDirectory(prefix="recap-try-") as folder:
        here = dataclasses.replace(run, folder=Path(folder))
        _plan(here, num_images)
        state = RunState(here)
        wanted = select_passes(state.passes, what)
        outcome = Runner(state, limit=num_images).execute(with_inputs(state.passes, wanted))
        if outcome.failures:
            raise MachineError("; ".join(outcome.failures.values()))
        if outcome.stopped:
            return
        yield from _show(Shard(run=here, plan=state.plan, number=0), wanted)


def _plan(run: Run, num_images: int) -> None:
    pieces = run.source.module.pieces(run.source.config)
    rows = [row for row in assign_shards(_sample(pieces, num_images), shard_size=num_images) if row.shard == 0]
    write_rows(
        run.folder / "plan.parquet",
        type(rows[0]),
        rows,
        Provenance(stage="plan", name="", version=1, slice={}, inputs={}),
    )


def _sample(pieces: Iterator[Piece], num_images: int) -> Iterator[Piece]:
    """The first images of the corpus; of tars, which only reading tells the length of, the first of a few."""
    num = 0
    for piece in pieces:
        if piece.num_samples is None:
            yield from _spread([piece, *islice(pieces, MAX_LISTED)], num_images - num)
            return
        yield piece
        num += piece.num_samples
        if num >= num_images:
            return


def _spread(pieces: list[Piece], num_images: int) -> Iterator[Piece]:
    near = [piece for piece in pieces if "://" not in piece.file] or pieces[:1]  # what is far is fetched whole
    some = near[:: -(-len(near) // NUM_FILES)]
    each = -(-num_images // len(some))
    for piece in some:
        yield dataclasses.replace(piece, stop=piece.start + min(each, piece.num_samples or each))


def _show(shard: Shard, wanted: list[Pass]) -> Iterator[str]:
    captions: dict[str, list[str]] = {}
    for p in wanted:
        for key, lines in _lines(shard, p):
            captions.setdefault(key, []).append(lines)
    for image in shard.read_table("image", Image):
        size = f"{image.width} x {image.height}" if image.width else image.error
        yield f"{image.key}  {image.source_key}  ({image.status}, {size})"
        yield _wrap("alt text", image.alt_text or "(none)")
        yield from captions.get(image.key, [])
        yield ""


def _lines(shard: Shard, p: Pass) -> Iterator[tuple[str, str]]:
    if p.record is Caption:
        for row in shard.read_table(p.folder, Caption):
            status = "" if row.status == "ok" else f" [{row.status}: {row.error}]"
            yield (
                row.key,
                _wrap(f"{p.name} {row.candidate}{status}{' ' + ','.join(row.flags) if row.flags else ''}", row.text),
            )
    elif p.record is Score:
        for mark in shard.read_table(p.folder, Score):
            value = mark.status if mark.value is None else f"{mark.value:.2f}"
            yield mark.key, _wrap(f"{p.title} {mark.candidate}", value)
            for c in mark.criteria:
                yield mark.key, _wrap(f"  {c.id}", f"{c.verdict or 'cannot say'}: {c.reason or ''}")
    else:
        for rubric in shard.read_table(p.folder, ImageRubric):
            yield rubric.key, _wrap(p.title, rubric.error or f"{len(rubric.criteria)} criteria")
            for demand in rubric.criteria:
                yield rubric.key, _wrap(f"  {demand.id} ({demand.severity}, missed {demand.missed:.0%})", demand.text)


def _wrap(title: str, text: str) -> str:
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, initial_indent=f"{INDENT}{title}: ", subsequent_indent=INDENT * 2)
