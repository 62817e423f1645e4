"""A preview: random images go through one pass and its inputs, in a temporary directory, and are printed."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from pipeline.engines import Engine, Reply, Request
from pipeline.errors import UserError
from pipeline.execution import sample
from pipeline.execution.pass_graph import add_inputs, list_passes, select_passes
from pipeline.execution.passes import COPIES, Pass, Shard
from pipeline.execution.run_state import RunState
from pipeline.execution.sample import Timing
from pipeline.progress import escape_controls, format_count, format_duration, format_quantity, format_rate
from pipeline.records import Caption, Finding, Image, ImageRubric, Piece, Score
from pipeline.sections import Run

INDENT = "    "
MAX_ROUNDS = 4  # of drawing images, until enough of them are asked for
GROWTH = 16  # times as many images as are wanted, at most, in one round


Prompts = dict[str, dict[tuple[str, str], None]]  # key of an image -> engines and what they were asked, each once


class ListeningEngine:
    """An engine that notes what it is asked."""

    def __init__(self, engine: Engine, name: str, prompts: Prompts) -> None:
        self.model, self.revision = engine.model, engine.revision
        self.waiting, self.close = engine.waiting, engine.close
        self._engine, self._name, self._prompts = engine, name, prompts

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        return self._engine.generate(map(self._note, requests))

    def _note(self, request: Request) -> Request:
        shown = (len(request.images) - len(request.examples)) * ["[image]"]
        before = [part for prompt, answer in request.examples for part in ("[image]", prompt, answer)]
        text = "\n".join(filter(None, [request.system, *before, *shown, request.prompt]))
        self._prompts.setdefault(request.id.partition("/")[0], {})[self._name, text] = None
        return request


def preview_passes(run: Run, name: str, *, num_images: int, with_prompts: bool = False) -> Iterator[str]:
    """Runs the passes called `name` (STAGE or STAGE:NAME) on random images that they ask for; yields lines by image.

    The same images for the same seed and plan.

    Args:
        run: the run, which stays as it is.
        name: of the passes.
        num_images: to show.
        with_prompts: show what the engines are asked, too.

    Raises:
        UserError: there is no such pass, or it writes no findings, captions, rubrics or scores.
        MachineError: a shard failed.
    """
    for p in _select_shown(list_passes(run), name):
        if not issubclass(p.record, Finding | Caption | ImageRubric | Score):
            shown = "findings, captions, rubrics and scores"
            raise UserError(f"STAGE: `recap try` shows {shown}; {p.title} makes none of them")
    with sample.open_folder(run) as copy:
        shards, keys = _draw_images(copy, name, sample.read_pieces(run), num_images)
        state = sample.plan_sample(copy, shards)
        passes = _select_shown(state.passes, name)
        prompts: Prompts = {}
        limited = [_limit_pass(p, keys, prompts) for p in passes]
        timings = list(sample.make_passes(state, limited)) if keys else []
        for shard in map(partial(_open_shard, state), state.selected) if keys else ():
            yield from _format_images(shard, passes, keys, prompts if with_prompts else {})
        footers = (state.states.footer("image", shard) for shard in state.selected)
        num_drawn = sum(footer.num_rows for footer in footers if footer)
        yield f"{name} asks for {format_count(len(keys))} of {format_quantity(num_drawn, 'random image')}"
        yield from map(_format_timing, timings)


def _select_shown(passes: Sequence[Pass], name: str) -> list[Pass]:
    """The passes of this name, without what only gives rows to copies."""
    return [p for p in select_passes([*passes], name) if p.part != COPIES]


def _draw_images(
    copy: Run, name: str, pieces: Sequence[Piece], num_images: int
) -> tuple[list[list[Piece]], frozenset[str]]:
    """Draws images and makes the inputs of the passes, in rounds, until enough images are asked for.

    Returns:
        The images of each round, a shard each, and the keys of the images to show.
    """
    random, counter = Random(copy.seed), sample.SampleCounter(copy.source)
    shards: list[list[Piece]] = []
    keys: list[str] = []
    size = num_images
    while len(keys) < num_images and len(shards) < MAX_ROUNDS:
        drawn = [piece for shard in shards for piece in shard]
        new = sample.draw_pieces(pieces, size, random=random, counter=counter, without=drawn)
        if not new:
            break
        shards.append(new)
        keys += _find_asked(copy, name, shards)
        missing, num_drawn = num_images - len(keys), sum(map(len, shards))
        size = min(GROWTH * num_images, -(-num_drawn * missing // max(1, len(keys))))
    return shards, frozenset(keys[:num_images])


def _find_asked(copy: Run, name: str, shards: Sequence[Sequence[Piece]]) -> list[str]:
    """The keys of the last shard's images for which the passes have inputs, which are made."""
    state = sample.plan_sample(copy, shards, selected=str(len(shards) - 1))
    passes = _select_shown(state.passes, name)
    folders = {p.folder for p in passes}
    for _ in sample.make_passes(state, [p for p in add_inputs(state.passes, passes) if p.folder not in folders]):
        pass
    shard = _open_shard(state, state.selected[0])
    return list(dict.fromkeys(str(item.id[0]) for p in passes for item in p.inputs(shard)))


def _open_shard(state: RunState, number: int) -> Shard:
    return Shard(run=state.run, number=number, pieces=state.plan.pieces(number))


def _limit_pass(p: Pass, keys: Collection[str], prompts: Prompts) -> Pass:
    """The pass on these images alone, which notes what it asks engines."""

    def work(inputs: Iterator[Any], engines: Mapping[str, Engine]) -> Iterator[Any]:
        return p.work(inputs, {name: ListeningEngine(engine, name, prompts) for name, engine in engines.items()})

    return dataclasses.replace(p, inputs=partial(_limit_inputs, p.inputs, keys), work=work)


def _limit_inputs(inputs: Callable[[Shard], Iterator[Any]], keys: Collection[str], shard: Shard) -> Iterator[Any]:
    return (item for item in inputs(shard) if item.id[0] in keys)


def _format_timing(timing: Timing) -> str:
    rows = sum(stat.num_new_rows for stat in timing.stats)
    loading = f", after {format_duration(timing.load_seconds)} of loading" if timing.load_seconds >= 1 else ""
    made = f"{timing.p.title} made {format_quantity(rows, 'row')} in {format_duration(timing.seconds)}"
    return f"{made}, {format_rate(rows / max(timing.seconds, 1e-9))} rows/s{loading}"


def _format_images(shard: Shard, passes: Sequence[Pass], keys: Collection[str], prompts: Prompts) -> Iterator[str]:
    results: dict[str, list[str]] = {}
    for p in passes:
        for key, text in _format_rows(shard, p):
            results.setdefault(key, []).append(text)
    for image in shard.read_table("image", Image):
        if image.key not in keys:
            continue
        size = f"{image.width} x {image.height}" if image.width else image.error
        yield escape_controls(f"{image.source_key}  ({image.status}, {size})", keep="")
        yield _wrap_text("alt text", image.alt_text or "(none)")
        for engine, prompt in prompts.get(image.key, ()):
            yield f"{INDENT}{engine} is asked:"
            yield textwrap.indent(prompt, INDENT * 2)
        yield from results.get(image.key, [])
        yield ""


def _format_rows(shard: Shard, p: Pass) -> Iterator[tuple[str, str]]:
    """(key of an image, lines of text) for each row of a pass."""
    if issubclass(p.record, Caption):
        for caption in shard.read_table(p.folder, p.record):
            status = "" if caption.status == "ok" else f" [{caption.status}: {caption.error}]"
            flags = f" {','.join(caption.flags)}" if caption.flags else ""
            yield caption.key, _wrap_text(f"{p.name} {caption.candidate}{status}{flags}", caption.text)
            for step in getattr(caption, "steps", ()):
                item = f" ({step.item})" if step.item else ""
                status = "" if step.status == "ok" else f" [{step.status}]"
                yield caption.key, _wrap_text(f"  {step.name}{item}{status}", step.text)
    elif p.record is Finding:
        for finding in shard.read_table(p.folder, Finding):
            yield finding.key, _wrap_text(p.title, finding.error or f"{len(finding.found)} found")
            for one in finding.found:
                box = () if one.x0 is None else (f"{n:.3f}" for n in (one.x0, one.y0, one.x1, one.y1) if n is not None)
                confidence = "" if one.confidence is None else f"({one.confidence:.2f})"
                words = (one.text, " ".join(box), confidence)
                yield finding.key, _wrap_text(f"  {one.label}", "  ".join(filter(None, words)))
    elif p.record is Score:
        *_, folder = (folder for folder in p.reads if folder.endswith(f"caption/{p.caption}"))
        captions = {caption.id: caption.text for caption in shard.read_table(folder, Caption)}
        for score in shard.read_table(p.folder, Score):
            yield score.key, _wrap_text(f"{p.caption} {score.candidate}", captions[score.key, score.candidate])
            value = score.status if score.value is None else f"{score.value:.2f}"
            yield score.key, _wrap_text(f"{p.title} {score.candidate}", value)
            for answer in score.criteria:
                parts = (answer.verdict or "cannot say", answer.reason)
                yield score.key, _wrap_text(f"  {answer.id}", ": ".join(filter(None, parts)))
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
