"""Near duplicates among perceptual hashes: which pairs differ in few bits, and which image stands for each group.

By the pigeonhole principle, two hashes that differ in at most d of 256 bits differ in few bits of at least one of m
bands (multi-index hashing: Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", 2012).
Hashes are sorted by each band, looked up with every small number of its bits flipped, and candidates are verified.

Memory is about 150 bytes a hash. What a hash is made from is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations, pairwise
from math import comb
from operator import or_
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Hashes = npt.NDArray[np.uint64]  # one row per hash: 4 words, the first bits in the first word
    Ints = npt.NDArray[np.int64]

NUM_BITS, WORD_BITS = 256, 64
MAX_DISTANCE = 63  # bits; the search takes too long beyond
MAX_BAND = 24  # bits of a band: its table has 2^24 entries of 4 bytes
MAX_BUCKET = 10_000  # hashes with the same band; larger buckets are passed over
BATCH = 1 << 15  # candidate pairs at a time: they fit a core's cache
CANDIDATE_COST = 12  # time of a candidate pair in look-ups
THREADS = 4  # at most; each has a copy of the hashes and a band's table


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of hashes that differ in few bits, sorted by `later`, then `earlier`; a pair may be in it several times."""

    earlier: Ints  # index of a hash
    later: Ints
    distance: Ints  # bits
    num_passed_over: int = 0  # hashes that share a band with too many others to be compared there


@dataclass(frozen=True, kw_only=True)
class Band:
    """Consecutive bits of the hashes, and in how many of them a pair may differ to be found by them."""

    start: int
    stop: int
    radius: int


def choose_bands(num_hashes: int, max_distance: int) -> list[Band]:
    """The bands that find all pairs with the least work.

    At least one band of a pair differs in no more than its radius, because all radii plus one add up to more than
    `max_distance`.
    """
    widest = min(MAX_BAND, num_hashes.bit_length() + 2)
    choices = (divide_bands(num, max_distance, widest=widest) for num in range(1, max_distance + 2))
    return min(choices, key=lambda bands: sum(_estimate_work(band, num_hashes) for band in bands))


def divide_bands(num: int, max_distance: int, *, widest: int = MAX_BAND) -> list[Band]:
    """`num` bands of about the same width, evenly spread; those that would be too wide leave bits out."""
    share, rest = divmod(max_distance + 1, num)
    return [
        Band(start=start, stop=min(stop, start + widest), radius=share + (n < rest) - 1)
        for n, (start, stop) in enumerate(pairwise(n * NUM_BITS // num for n in range(num + 1)))
    ]


def _estimate_work(band: Band, num_hashes: int) -> float:
    """The time of a band in look-ups, if its bits were independent."""
    width = band.stop - band.start
    num_lookups: int = num_hashes * sum(comb(width, num) for num in range(band.radius + 1))
    return float(num_lookups) / 2 * (1 + CANDIDATE_COST * num_hashes / (1 << width)) + (1 << width)


def find_pairs(
    hashes: Hashes,
    *,
    max_distance: int,
    max_bucket: int = MAX_BUCKET,
    num_threads: int = 1,
    check_stop: Callable[[], None] = lambda: None,
) -> Pairs:
    """All pairs that differ in at most `max_distance` bits.

    Args:
        hashes: distinct ones.
        max_bucket: pairs that agree only in bands with more than so many hashes are not found.
        check_stop: called between batches; what it raises ends the search.
    """
    import numpy as np

    bands = choose_bands(len(hashes), max_distance) if len(hashes) > 1 else []
    search = partial(_search_band, hashes, max_distance=max_distance, max_bucket=max_bucket, check_stop=check_stop)
    with ThreadPoolExecutor(max(1, min(num_threads, THREADS))) as threads:
        found = [*threads.map(search, bands)]
    passed_over = reduce(or_, (skipped for _, skipped in found), np.zeros(len(hashes), bool))
    none = (np.empty(0, np.int64),) * 3
    batches = [none, *(batch for batches, _ in found for batch in batches)]
    one, other, distance = (np.concatenate(column) for column in zip(*batches, strict=True))
    earlier, later = np.minimum(one, other), np.maximum(one, other)
    order = np.lexsort((earlier, later))
    return Pairs(
        earlier=earlier[order],
        later=later[order],
        distance=distance[order],
        num_passed_over=int(passed_over.sum()),
    )


def _search_band(
    hashes: Hashes, band: Band, *, max_distance: int, max_bucket: int, check_stop: Callable[[], None]
) -> tuple[list[tuple[Ints, Ints, Ints]], npt.NDArray[np.bool_]]:
    """The pairs that a band shows, in batches, and which hashes it passed over."""
    import numpy as np

    keys = _read_bits(hashes, band.start, band.stop)
    order = np.argsort(keys)
    keys, halves = keys[order], hashes.view(np.complex128)[order]  # 128 bits are moved at once
    halves = np.ascontiguousarray(halves.T)
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    counts = np.diff(starts, append=len(keys))
    passed_over = np.zeros(len(keys), bool)
    passed_over[order] = np.repeat(counts > max_bucket, counts)
    small = counts <= max_bucket
    found = []
    for one, other in _find_candidates(keys[starts[small]], starts[small], counts[small], band):
        check_stop()
        near, distance = _verify(halves, one, other, max_distance)
        found.append((order[one[near]], order[other[near]], distance))
    return found, passed_over


def _read_bits(hashes: Hashes, start: int, stop: int) -> Ints:
    """Bits `start` to `stop` of every hash, as a number."""
    import numpy as np

    word, shift = divmod(start, WORD_BITS)
    bits = hashes[:, word] << np.uint64(shift)
    if shift and word + 1 < hashes.shape[1]:
        bits = bits | (hashes[:, word + 1] >> np.uint64(WORD_BITS - shift))
    return (bits >> np.uint64(WORD_BITS - (stop - start))).astype(np.int64)


def _find_candidates(keys: Ints, starts: Ints, counts: Ints, band: Band) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of positions whose keys differ in at most `radius` bits, each once, in batches.

    Args:
        keys: the distinct keys, ascending.
        starts, counts: the positions of each.
    """
    import numpy as np

    slot = np.full(2 ** (band.stop - band.start), -1, np.int32)
    slot[keys] = np.arange(len(keys), dtype=np.int32)
    own = np.flatnonzero(counts > 1)
    waiting, num_waiting = [(own, own)], len(own)  # pairs of keys
    for top in range((band.stop - band.start) if band.radius else 0):
        lower = np.flatnonzero(keys >> top & 1 == 0)  # of two keys that differ in this bit, the one without it
        flipped = keys[lower] | (1 << top)
        for mask in _list_masks(top, band.radius - 1):
            other = slot.take(flipped ^ mask, mode="clip")  # without the check of bounds
            hits = np.flatnonzero(other >= 0)
            waiting.append((lower[hits], other[hits]))
            num_waiting += len(hits)
            if num_waiting > BATCH:
                yield from _join(waiting, starts, counts)
                waiting, num_waiting = [], 0
    yield from _join(waiting, starts, counts)


def _list_masks(num_bits: int, most: int) -> Iterator[int]:
    """All numbers below 2^`num_bits` with at most so many bits set."""
    for num in range(most + 1):
        for bits in combinations(range(num_bits), num):
            yield sum(1 << bit for bit in bits)


def _join(pairs: Sequence[tuple[Ints, Ints]], starts: Ints, counts: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of a position of one key and a position of the other; of one key with itself, each pair once."""
    import numpy as np

    for ones, others in pairs:
        sizes = counts[ones].astype(np.int64) * counts[others]
        ends = np.cumsum(sizes)
        for first, last in _split_sizes(ends):
            one, other, size = ones[first:last], others[first:last], sizes[first:last]
            single = size == 1
            yield starts[one[single]], starts[other[single]]
            several = np.flatnonzero(~single)
            which = np.repeat(several, size[several])
            if not len(which):
                continue
            before = np.cumsum(size[several]) - size[several]
            within = np.arange(len(which)) - np.repeat(before, size[several])
            row, column = np.divmod(within, counts[other[which]])
            a, b = starts[one[which]] + row, starts[other[which]] + column
            different = (one[which] != other[which]) | (a < b)
            yield a[different], b[different]


def _split_sizes(ends: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of entries whose sizes add up to about `BATCH`, at least one entry each."""
    import numpy as np

    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BATCH, side="right")))
        yield first, last
        first = last


def _verify(halves: npt.NDArray[np.complex128], one: Ints, other: Ints, max_distance: int) -> tuple[Ints, Ints]:
    """The pairs of positions that differ in at most `max_distance` bits, and in how many."""
    import numpy as np

    near, distance = np.arange(len(one)), np.zeros(len(one), np.int64)
    for half in halves:  # one half of the bits tells nearly all others apart
        a, b = half.take(one[near], mode="clip"), half.take(other[near], mode="clip")
        distance += np.bitwise_count(a.view(np.uint64) ^ b.view(np.uint64)).reshape(-1, 2) @ np.ones(2, np.int64)
        close = distance <= max_distance
        near, distance = near[close], distance[close]
    return near, distance


def choose_representatives(num: int, pairs: Pairs) -> tuple[Ints, Ints]:
    """For each hash the representative of its group, and the distance to it.

    In order, a hash joins the nearest representative among its pairs, the earliest of equally near ones; without one it
    is a representative itself. Later hashes change nothing for earlier ones, and no group is wider than a pair may be.
    """
    import numpy as np

    representative, distance = np.arange(num), np.zeros(num, np.int64)
    is_first = np.ones(len(pairs.later), bool)
    is_first[1:] = pairs.later[1:] != pairs.later[:-1]
    for start, stop in pairwise([*np.flatnonzero(is_first), len(is_first)]):
        earlier = pairs.earlier[start:stop]
        near = np.where(representative[earlier] == earlier, pairs.distance[start:stop], NUM_BITS - 1)
        best = int(near.argmin())
        if near[best] < NUM_BITS - 1:
            later = pairs.later[start]
            representative[later], distance[later] = earlier[best], near[best]
    return representative, distance
