"""A sample of a run: random images of its plan, made in a temporary directory by the machinery of the run itself.

It chooses the images and takes the times. Its users know what they are for.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from pipeline.errors import RefusedError
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.passes import Pass
from pipeline.execution.run_state import RunState
from pipeline.execution.shard_maker import ShardMaker
from pipeline.execution.signals import stop_on_signal
from pipeline.progress import ProgressMeter
from pipeline.records import Piece, Planned, Stat
from pipeline.sections import Plugin, Run
from pipeline.storage.plan import Plan
from pipeline.storage.tables import Provenance, write_rows

NUM_RANGES = 8  # of images that are drawn together where only reading tells how many a file holds
BYTES_PER_IMAGE = 400_000  # more than usual, so that a range drawn within a file that is not counted is within it


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The making of one pass of a sample."""

    p: Pass
    load_seconds: float  # until its engines were ready
    stats: tuple[Stat, ...]  # one per shard of the sample
    row_times: tuple[float, ...]  # seconds from the start of the last shard to each of its rows

    @property
    def seconds(self) -> float:
        """Seconds of all shards without the loading."""
        return sum(stat.seconds for stat in self.stats)


class SampleCounter:
    """Counts the samples of files of which the plan does not know how many they hold, where that costs little."""

    def __init__(self, source: Plugin) -> None:
        self.counts: dict[Piece, int] = {}  # of the pieces that were counted
        self._source = source

    def count(self, piece: Piece) -> int | None:
        """The number of samples in a piece; None when only reading all of it would tell."""
        if piece.num_samples is not None:
            return piece.num_samples
        if piece not in self.counts and (count := getattr(self._source.module, "count", None)):
            num = count(piece, self._source.config)
            if num is not None:
                self.counts[piece] = max(0, num - piece.start)
        return self.counts.get(piece)


def read_pieces(run: Run) -> list[Piece]:
    """The pieces of the whole plan, or, before there is one, of the corpus."""
    path = run.folder / "plan.parquet"
    if not path.exists():
        return list(run.source.module.pieces(run.source.config))
    plan, _ = Plan.load(path)
    columns = plan.rows.select(["file", "start", "stop", "num_bytes"])
    return [Piece(**row) for batch in columns.to_batches() for row in batch.to_pylist()]


def draw_pieces(
    pieces: Sequence[Piece], num: int, *, random: Random, counter: SampleCounter, without: Collection[Piece] = ()
) -> list[Piece]:
    """Draws `num` images without replacement, each image of the corpus with the same probability, in its order.

    Where only reading tells how many images a file holds, it draws up to NUM_RANGES files, with probabilities in
    proportion to their bytes, and from each as many ranges as make NUM_RANGES together, spread over the file. Files
    that the source cannot count either (remote and compressed ones) give images of their first part.

    Args:
        without: pieces that were drawn before; what overlaps them is left out.

    Raises:
        RefusedError: there are no images.
    """
    if not pieces:
        raise RefusedError("plan.parquet holds no images; is source.path right? `recap plan` reads the corpus again")
    counts = [piece.num_samples for piece in pieces]
    if None in counts:
        found = _draw_ranges(pieces, num, random, counter)
    else:
        ends = list(accumulate(count or 0 for count in counts))
        drawn = sorted(random.sample(range(ends[-1]), min(num, ends[-1])))
        found = [_pick_image(pieces, ends, index) for index in drawn]
    return [piece for piece in found if not any(_overlap(piece, other) for other in without)]


def _overlap(piece: Piece, other: Piece) -> bool:
    if piece.file != other.file:
        return False
    return (other.stop is None or piece.start < other.stop) and (piece.stop is None or other.start < piece.stop)


def split_pieces(pieces: Sequence[Piece], num: int) -> tuple[list[Piece], list[Piece]]:
    """The first `num` images of drawn pieces, and the others; all are others where there are no more than `num`."""
    first: list[Piece] = []
    rest: list[Piece] = []
    for piece in pieces:
        taken = min(num - sum(one.num_samples or 0 for one in first), piece.num_samples or 0)
        cut = piece.start + taken
        first += [dataclasses.replace(piece, stop=cut)] if taken else []
        rest += [dataclasses.replace(piece, start=cut)] if cut != piece.stop else []
    return (first, rest) if rest else ([], list(pieces))


def _pick_image(pieces: Sequence[Piece], ends: Sequence[int], index: int) -> Piece:
    at = bisect_right(ends, index)
    piece = pieces[at]
    start = piece.start + index - (ends[at - 1] if at else 0)
    return dataclasses.replace(piece, start=start, stop=start + 1)


def _draw_ranges(pieces: Sequence[Piece], num: int, random: Random, counter: SampleCounter) -> list[Piece]:
    local = [piece for piece in pieces if "://" not in piece.file] or pieces[:1]  # remote files are downloaded whole
    local = [piece for piece in local if piece.num_bytes != 0] or local
    # Efraimidis and Spirakis (2006): the highest keys are a draw without replacement by weight.
    keys = [math.log(1 - random.random()) / (piece.num_bytes or 1) for piece in local]
    order = sorted(range(len(local)), key=keys.__getitem__, reverse=True)
    room: dict[int, int] = {}  # in each chosen file; as much as is wanted in one that is not counted
    for n in order:
        if len(room) >= min(NUM_RANGES, num) and sum(room.values()) >= num:
            break
        count = counter.count(local[n])
        room[n] = num if count is None else count
    shares = _share_out(num, room)
    parts = -(-NUM_RANGES // len(room))
    return [part for n in sorted(room) for part in _spread_ranges(local[n], shares[n], parts, random, counter)]


def _share_out(num: int, room: Mapping[int, int]) -> dict[int, int]:
    """`num` images over files as evenly as there is room."""
    shares: dict[int, int] = {}
    for place, n in enumerate(sorted(room, key=room.__getitem__)):
        shares[n] = min(room[n], -(-(num - sum(shares.values())) // (len(room) - place)))
    return shares


def _spread_ranges(piece: Piece, num: int, parts: int, random: Random, counter: SampleCounter) -> Iterator[Piece]:
    """Ranges of `num` images in all, one at a random position of each equal part of the piece."""
    count = counter.count(piece)
    if count is None:
        start = piece.start + random.randrange(max(1, (piece.num_bytes or 0) // BYTES_PER_IMAGE - num + 1))
        yield dataclasses.replace(piece, start=start, stop=start + num)
        return
    parts = min(parts, num)
    for part in range(parts):
        first, last = (piece.start + edge * count // parts for edge in (part, part + 1))
        share = (part + 1) * num // parts - part * num // parts
        start = random.randint(first, last - share)
        yield dataclasses.replace(piece, start=start, stop=start + share)


@contextmanager
def open_folder(run: Run) -> Iterator[Run]:
    """The run with an empty temporary directory for its tables."""
    with tempfile.TemporaryDirectory(prefix="recap-sample-") as folder:
        yield dataclasses.replace(run, folder=Path(folder))


def plan_sample(run: Run, shards: Sequence[Sequence[Piece]], *, selected: str = "all") -> RunState:
    """Writes the plan of a sample, each group of pieces a shard; returns its state."""
    rows = [
        Planned(shard=number, file=piece.file, start=piece.start, stop=piece.stop, num_bytes=piece.num_bytes)
        for number, group in enumerate(shards)
        for piece in group
    ]
    provenance = Provenance(stage="plan", name="", version=1, slice={}, inputs={})
    write_rows(run.folder / "plan.parquet", Planned, rows, provenance)
    return RunState(run, shards=selected)


def make_passes(state: RunState, passes: Sequence[Pass]) -> Iterator[Timing]:
    """Makes the selected shards of these passes, pass by pass and shard by shard, and times them.

    Raises:
        StoppedError: a signal came.
        UserError, MachineError: an engine cannot be opened, or a shard failed.
    """
    stop = threading.Event()
    engines = EnginePool(state.run.engines, stop=stop)
    maker = ShardMaker(state.states, stop=stop, retry=frozenset())
    try:
        with stop_on_signal(stop):
            for p in passes:
                engines.close_all_but(p.engines)
                state.states.forget_whole()
                try:
                    yield _make_pass(p, state, engines, maker)
                finally:
                    if p.close:
                        p.close()
    finally:
        engines.close_all_but(())


def _make_pass(p: Pass, state: RunState, engines: EnginePool, maker: ShardMaker) -> Timing:
    start = time.monotonic()
    for name in p.engines:
        engines[name]
    loaded = time.monotonic()
    stats = []
    meter = _RowTimer(p.title)  # of the last shard, whose rows are the most even
    for shard in state.selected:
        meter = _RowTimer(p.title)
        stats.append(maker.make(p, shard, engines, meter).stat)
        state.states.forget(shard)
    if p.finish and state.is_complete(p):
        p.finish(state.run, True)
    return Timing(p=p, load_seconds=loaded - start, stats=tuple(stats), row_times=tuple(meter.times))


class _RowTimer(ProgressMeter):
    """Notes when each row was made."""

    def __init__(self, title: str) -> None:
        super().__init__(title, num_shards=1, num_rows=None)
        self.times: list[float] = []
        self._began = time.monotonic()

    def add(self, rows: int, failed: int, restored: int = 0, tokens: int = 0) -> None:
        super().add(rows, failed, restored, tokens)
        self.times += [time.monotonic() - self._began] * rows
