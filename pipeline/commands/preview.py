"""A preview: a few images go through one pass and its inputs, in a temporary directory, and the results are printed."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline.errors import MachineError, UserError
from pipeline.execution.pass_graph import add_inputs, list_passes, select_passes
from pipeline.execution.passes import Pass, Shard
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.progress import escape_controls
from pipeline.records import Caption, Image, ImageRubric, Piece, Score
from pipeline.sections import Run
from pipeline.storage.plan import assign_shards
from pipeline.storage.tables import Provenance, write_rows

INDENT = "    "
NUM_FILES = 4  # opened when each file holds many images
MAX_LISTED = 1000  # files of the corpus from which those are chosen


def preview_passes(run: Run, name: str, *, num_images: int) -> Iterator[str]:
    """Runs the passes called `name` (STAGE or STAGE:NAME) on the first images of the corpus; yields lines by image.

    Raises:
        UserError: there is no such pass, or it writes neither captions nor rubrics nor scores.
        MachineError: a shard failed.
    """
    for p in select_passes(list_passes(run), name):
        if p.record not in (Caption, ImageRubric, Score):
            raise UserError(f"STAGE: `recap try` shows captions, rubrics and scores; {p.title} makes none of them")
    with tempfile.TemporaryDirectory(prefix="recap-try-") as folder:
        copy = dataclasses.replace(run, folder=Path(folder))
        _write_plan(copy, num_images)
        state = RunState(copy)
        passes = select_passes(state.passes, name)
        outcome = Runner(state, limit=num_images).execute(add_inputs(state.passes, passes))
        if outcome.failures:
            raise MachineError("; ".join(outcome.failures.values()))
        if outcome.stopped:
            return
        yield from _format_images(Shard(run=copy, number=0, pieces=state.plan.pieces(0)), passes)


def _write_plan(run: Run, num_images: int) -> None:
    pieces = run.source.module.pieces(run.source.config)
    rows = [row for row in assign_shards(_select_pieces(pieces, num_images), shard_size=num_images) if row.shard == 0]
    write_rows(
        run.folder / "plan.parquet",
        type(rows[0]),
        rows,
        Provenance(stage="plan", name="", version=1, slice={}, inputs={}),
    )


def _select_pieces(pieces: Iterator[Piece], num_images: int) -> Iterator[Piece]:
    """The first images of the corpus; if only reading tells the length of a file, the first images of a few files."""
    num = 0
    for piece in pieces:
        if piece.num_samples is None:
            yield from _spread_pieces([piece, *islice(pieces, MAX_LISTED)], num_images - num)
            return
        yield piece
        num += piece.num_samples
        if num >= num_images:
            return


def _spread_pieces(pieces: list[Piece], num_images: int) -> Iterator[Piece]:
    local = [piece for piece in pieces if "://" not in piece.file] or pieces[:1]  # remote files are downloaded whole
    chosen = local[:: -(-len(local) // NUM_FILES)]
    share = -(-num_images // len(chosen))
    for piece in chosen:
        yield dataclasses.replace(piece, stop=piece.start + min(share, piece.num_samples or share))


def _format_images(shard: Shard, passes: list[Pass]) -> Iterator[str]:
    results: dict[str, list[str]] = {}
    for p in passes:
        for key, text in _format_rows(shard, p):
            results.setdefault(key, []).append(text)
    for image in shard.read_table("image", Image):
        size = f"{image.width} x {image.height}" if image.width else image.error
        yield escape_controls(f"{image.key}  {image.source_key}  ({image.status}, {size})", keep="")
        yield _wrap_text("alt text", image.alt_text or "(none)")
        yield from results.get(image.key, [])
        yield ""


def _format_rows(shard: Shard, p: Pass) -> Iterator[tuple[str, str]]:
    """(key of an image, lines of text) for each row of a pass."""
    if p.record is Caption:
        for caption in shard.read_table(p.folder, Caption):
            status = "" if caption.status == "ok" else f" [{caption.status}: {caption.error}]"
            flags = f" {','.join(caption.flags)}" if caption.flags else ""
            yield caption.key, _wrap_text(f"{p.name} {caption.candidate}{status}{flags}", caption.text)
    elif p.record is Score:
        for score in shard.read_table(p.folder, Score):
            value = score.status if score.value is None else f"{score.value:.2f}"
            yield score.key, _wrap_text(f"{p.title} {score.candidate}", value)
            for answer in score.criteria:
                yield (
                    score.key,
                    _wrap_text(f"  {answer.id}", f"{answer.verdict or 'cannot say'}: {answer.reason or ''}"),
                )
    else:
        for rubric in shard.read_table(p.folder, ImageRubric):
            yield rubric.key, _wrap_text(p.title, rubric.error or f"{len(rubric.criteria)} criteria")
            for criterion in rubric.criteria:
                yield (
                    rubric.key,
                    _wrap_text(
                        f"  {criterion.id} ({criterion.severity}, missed {criterion.missed:.0%})", criterion.text
                    ),
                )


def _wrap_text(title: str, text: str) -> str:
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, initial_indent=f"{INDENT}{title}: ", subsequent_indent=INDENT * 2)
