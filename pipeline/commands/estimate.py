"""`recap estimate`: the cost of a run, from random images of its plan that go through every pass.

Totals are those of the sample times planned images / sampled images. 95 % intervals: t over images for rows, tokens and
bytes; t over ten blocks of consecutive rows for times, since images are made together.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean, stdev
from typing import Any

from pipeline.engines import openai
from pipeline.errors import RefusedError
from pipeline.execution import sample
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.passes import COPIES
from pipeline.execution.run_state import RunState
from pipeline.execution.sample import Timing
from pipeline.progress import format_bytes, format_count, format_duration
from pipeline.records import Image, Piece
from pipeline.sections import Plugin, Run
from pipeline.storage import tables
from pipeline.storage.layout import table_path

FILE = "estimate.json"  # in the run's directory
NUM_WARM = 8  # images that are made first, while engines and decoders start
NUM_BLOCKS = 10  # of rows, for the interval of a time
Z = NormalDist().inv_cdf(0.975)
MEMBER_BYTES = 1536  # of a tar beside an image: its header and padding, and a small file


@dataclass(frozen=True, kw_only=True)
class Range:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        """The sum of two independent estimates: their half-widths add up as squares."""
        value, width = self.value + other.value, math.hypot(self.high - self.value, other.high - other.value)
        return Range(value=value, low=max(0.0, value - width), high=value + width)

    def scale(self, factor: float) -> Range:
        return Range(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def widen(self, share: float) -> Range:
        """The same estimate with an independent relative half-width besides its own."""
        own = (self.high - self.value) / self.value if self.value else 0.0
        width = self.value * math.hypot(own, share)
        return Range(value=self.value, low=max(0.0, self.value - width), high=self.value + width)


ZERO = Range(value=0.0, low=0.0, high=0.0)


@dataclass(frozen=True, kw_only=True)
class PassEstimate:
    """One pass over the whole plan."""

    title: str
    rows: Range
    prompt_tokens: Range
    output_tokens: Range
    seconds: Range  # of one process, without loading
    load_seconds: float  # of its engines, once per process
    num_gpus: int  # that its engines occupy meanwhile


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run over its whole plan."""

    made_at: float  # seconds since 1970, UTC
    num_sampled: int  # images
    num_images: Range  # of the plan; exact where the plan has their number
    passes: tuple[PassEstimate, ...]
    num_files: int
    num_bytes: Range  # that the run writes
    num_tasks: int
    price: float | None  # of a GPU-hour

    @property
    def tokens(self) -> Range:
        return sum((p.prompt_tokens + p.output_tokens for p in self.passes), ZERO)

    @property
    def hours(self) -> Range:
        """One task's, of `num_tasks` that work at the same time."""
        loading = sum(p.load_seconds for p in self.passes)
        total = sum((p.seconds for p in self.passes), ZERO).scale(1 / self.num_tasks)
        return (total + Range(value=loading, low=loading, high=loading)).scale(1 / 3600)

    @property
    def gpu_hours(self) -> Range:
        loads = (p.load_seconds * p.num_gpus * self.num_tasks for p in self.passes)
        loading = sum(loads)
        total = sum((p.seconds.scale(p.num_gpus) for p in self.passes), ZERO)
        return (total + Range(value=loading, low=loading, high=loading)).scale(1 / 3600)


def estimate_run(run: Run, *, num_images: int, num_tasks: int = 1, price: float | None = None) -> Estimate:
    """Sends random images through every pass, in a temporary directory, and stores the estimate in the run.

    Raises:
        RefusedError: the plan holds no images, or none of the sample could be read.
    """
    pieces = sample.read_pieces(run)
    random, counter = Random(run.seed), sample.SampleCounter(run.source)
    drawn = sample.draw_pieces(pieces, num_images + NUM_WARM, random=random, counter=counter)
    random.shuffle(drawn)
    warm, measured = sample.split_pieces(drawn, NUM_WARM)
    measured.sort(key=lambda piece: (piece.file, piece.start))
    shards = [warm, measured] if warm else [measured]
    last = len(shards) - 1
    with sample.open_folder(run) as copy:
        state = sample.plan_sample(copy, shards)
        timings = list(sample.make_passes(state, select_passes(state.passes, "all")))
        images = list(tables.read_rows(table_path(copy.folder, "image", last), Image))
        if not images:
            raise RefusedError(f"{run.file}: source: no image of the sample could be read; see `recap check`")
        total = count_images(pieces, images, counter.counts)
        sizes = [float(image.num_bytes or 0) for image in images]
        made = [path for path in copy.folder.rglob(f"*{last:05d}*") if path.is_file() and ".work" not in path.parts]
        written = sum(path.stat().st_size for path in made) / max(1.0, sum(sizes))
        estimate = Estimate(
            made_at=time.time(),
            num_sampled=len(images),
            num_images=total,
            passes=tuple(_estimate_pass(run, copy.folder, timing, images, total, shard=last) for timing in timings),
            num_files=len(made) * RunState(run).plan.num_shards,
            num_bytes=expand([size * written for size in sizes], total),
            num_tasks=num_tasks,
            price=price,
        )
    with tables.open_atomic(run.folder / FILE) as file:
        file.write(json.dumps(asdict(estimate), indent=2).encode())
    return estimate


def read_estimate(folder: Path) -> Mapping[str, Any]:
    """The stored estimate as JSON values; empty if there is none."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def count_images(pieces: Sequence[Piece], images: Sequence[Image], counts: Mapping[Piece, int]) -> Range:
    """The images of a plan: their number, or, where not all files are counted, bytes times images per byte.

    Images per byte are the mean of the counted files', which were drawn by their bytes; or, where none was counted,
    from the images of the sample.

    Args:
        pieces: of the plan.
        images: of the sample.
        counts: the images of the files that were counted.
    """
    known = [piece.num_samples if piece.num_samples is not None else counts.get(piece) for piece in pieces]
    if None not in known:
        num = float(sum(count or 0 for count in known))
        return Range(value=num, low=num, high=num)
    num_bytes = sum(piece.num_bytes or 0 for piece in pieces)
    if counts:
        densities = [count / max(1, piece.num_bytes or 0) for piece, count in counts.items()]
        num, rest = num_bytes * fmean(densities), math.sqrt(1 - len(counts) / len(pieces))
        return Range(value=num, low=num, high=num).widen(_relative_width(densities) * rest)
    sizes = [float(image.num_bytes or 0) + MEMBER_BYTES for image in images]
    num = num_bytes / fmean(sizes)
    return Range(value=num, low=num, high=num).widen(_relative_width(sizes))


def expand(values: Sequence[float], total: Range) -> Range:
    """The sum over `total` images, of which `values` are a random sample without replacement."""
    num = len(values)
    value = fmean(values) * total.value
    rest = math.sqrt(max(0.0, 1 - num / max(total.value, num)))  # finite population correction
    width = value * _relative_width(values) * rest
    return Range(value=value, low=max(0.0, value - width), high=value + width).widen(
        (total.high - total.value) / total.value if total.value else 0.0
    )


def expand_rows(values: Sequence[float], total: Range) -> Range:
    """As `expand`, for numbers of rows that may differ though all of the sample agree: none is kept, or each.

    The bound is Clopper and Pearson's for the share of images that have another number.
    """
    found, first = expand(values, total), values[0]
    if len(values) >= total.value or any(value != first for value in values):
        return found
    slack = (1 - 0.025 ** (1 / len(values))) * total.value * max(1.0, first)
    if first:
        return Range(value=found.value, low=max(0.0, found.low - slack), high=found.high)
    return Range(value=found.value, low=found.low, high=found.high + slack)


def _relative_width(values: Sequence[float]) -> float:
    """The half-width of the 95 % t interval of the mean, relative to it; 1 where two values are lacking."""
    if len(values) < 2:
        return 1.0
    mean = fmean(values)
    return _quantile_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)) / mean if mean else 0.0


def _quantile_t(freedom: int) -> float:
    """The 0.975 quantile of Student's t, by its expansion at the normal's (Abramowitz and Stegun 26.7.5)."""
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def _estimate_pass(
    run: Run, folder: Path, timing: Timing, images: Sequence[Image], total: Range, *, shard: int
) -> PassEstimate:
    """From a shard of the sample, with these images."""
    by_key: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in tables.read_rows(table_path(folder, timing.p.folder, shard), timing.p.record):
        counts = by_key[str(row.id[0])]
        counts[0] += 1
        if timing.p.part == COPIES:
            continue
        counts[1] += getattr(row, "num_prompt_tokens", None) or 0
        counts[2] += getattr(row, "num_output_tokens", None) or 0
    rows, prompts, outputs = zip(*(by_key[image.key] for image in images), strict=True)
    mean = timing.stats[-1].seconds / len(images)
    seconds = total.scale(mean).widen(_relative_width(list(_split_times(timing.row_times))))
    return PassEstimate(
        title=timing.p.title,
        rows=expand_rows(rows, total) if timing.p.reads else expand(rows, total),
        prompt_tokens=expand(prompts, total),
        output_tokens=expand(outputs, total),
        seconds=seconds,
        load_seconds=timing.load_seconds,
        num_gpus=sum(_count_gpus(run.engines[name]) for name in timing.p.engines),
    )


def _split_times(times: Sequence[float]) -> Iterator[float]:
    """The seconds of each of NUM_BLOCKS blocks of rows; fewer blocks of few rows."""
    num = min(NUM_BLOCKS, len(times))
    ends = [0.0, *(times[(n + 1) * len(times) // num - 1] for n in range(num))] if num else []
    yield from (after - before for before, after in pairwise(ends))


def _count_gpus(plugin: Plugin) -> int:
    """The GPUs that an engine occupies, where it computes on GPUs of the run's own."""
    config = plugin.config
    if getattr(plugin.module, "ON_DEVICES", False):
        return int(getattr(config, "tensor_parallel_size", 1))
    if isinstance(config, openai.Config) and all(url.endswith(".json") for url in config.urls):  # `recap serve`
        return config.serve.replicas * config.serve.tensor_parallel_size
    return 0


def format_estimate(estimate: Estimate, *, free: int) -> Iterator[str]:
    """The estimate as lines of a table and its totals."""
    head = ("pass", "rows", "tokens in", "tokens out", "time of one process")
    body = [
        (p.title, *map(_format, (p.rows, p.prompt_tokens, p.output_tokens)), _format(p.seconds, format_duration))
        for p in estimate.passes
    ]
    yield from _align([head, *body])
    yield ""
    per_task = "in one process" if estimate.num_tasks == 1 else f"at {estimate.num_tasks} tasks"
    totals = {
        "tokens": _format(estimate.tokens),
        "GPU-hours": _format(estimate.gpu_hours, _format_hours),
        "hours": f"{_format(estimate.hours, _format_hours)} {per_task}, loading included",
        "files": format_count(estimate.num_files),
        "bytes": f"{_format(estimate.num_bytes, format_bytes)} are written, {format_bytes(free)} are free",
    }
    if estimate.price is not None:
        totals["money"] = _format(estimate.gpu_hours.scale(estimate.price), lambda num: f"{num:,.2f}")
    yield from _align(list(totals.items()))
    yield ""
    yield (
        f"from {format_count(estimate.num_sampled)} random images of {_format(estimate.num_images)}; in brackets 95 %"
        " intervals: t over images, for times t over blocks of rows"
    )


def _align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _format(one: Range, number: Any = format_count) -> str:
    text = number(one.value)
    return text if one.low == one.high else f"{text} ({number(one.low)} to {number(one.high)})"


def _format_hours(hours: float) -> str:
    return f"{hours:.3f}" if hours < 1 else f"{hours:,.1f}"


def compare(estimate: Mapping[str, Any], title: str, *, images: int, tokens: int, seconds: float) -> str:
    """Compares the cost of finished shards with the estimate for as many images; "" where there is none."""
    found: Iterable[Mapping[str, Any]] = (p for p in estimate.get("passes", ()) if p.get("title") == title)
    for p in found:
        share = images / max(1.0, estimate["num_images"]["value"])
        expected = {
            "tokens": (tokens, share * (p["prompt_tokens"]["value"] + p["output_tokens"]["value"])),
            "time": (seconds, share * p["seconds"]["value"]),
        }
        return ", ".join(f"{name} {got / due - 1:+.0%}" for name, (got, due) in expected.items() if due > 0)
    return ""
