"""The search for near hashes finds what a comparison of all pairs finds, and groups are stable under growth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.near_duplicates import (
    NUM_BITS,
    Pairs,
    choose_bands,
    choose_representatives,
    divide_bands,
    find_pairs,
)

Hashes = Any


def make_hashes(seed: int, num_clusters: int, size: int, spread: int) -> Hashes:
    """Distinct hashes in clusters, of which each is `spread` or fewer flipped bits of the first."""
    random = np.random.default_rng(seed)
    bits = np.repeat(random.integers(0, 2, (num_clusters, NUM_BITS), dtype=np.uint8), size, axis=0)
    for row in bits:
        row[random.integers(0, NUM_BITS, random.integers(0, spread + 1))] ^= 1
    return np.unique(np.packbits(random.permutation(bits), axis=1).view(">u8").astype(np.uint64), axis=0)


def compare_all(hashes: Hashes, max_distance: int) -> dict[tuple[int, int], int]:
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    near = np.argwhere(np.triu(distance <= max_distance, 1))
    return {(int(a), int(b)): int(distance[a, b]) for a, b in near}


def as_dict(pairs: Pairs) -> dict[tuple[int, int], int]:
    return dict(
        zip(zip(pairs.earlier.tolist(), pairs.later.tolist(), strict=True), pairs.distance.tolist(), strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_clusters=st.integers(0, 12),
    size=st.integers(1, 8),
    spread=st.integers(0, 40),
    max_distance=st.integers(0, 34),
)
def test_finds_all_near_pairs_and_no_others(
    seed: int, num_clusters: int, size: int, spread: int, max_distance: int
) -> None:
    hashes = make_hashes(seed, num_clusters, size, spread)
    pairs = find_pairs(hashes, max_distance=max_distance, num_threads=2)
    assert as_dict(pairs) == compare_all(hashes, max_distance)
    assert pairs.num_passed_over == 0


@given(st.integers(1, 10**9), st.integers(0, 63))
def test_bands_cannot_miss_a_pair(num_hashes: int, max_distance: int) -> None:
    for bands in (choose_bands(num_hashes, max_distance), divide_bands(max_distance // 2 + 1, max_distance)):
        assert sum(band.radius + 1 for band in bands) > max_distance
        assert all(a.stop <= b.start for a, b in pairwise(bands))


def test_large_buckets_are_passed_over_and_counted() -> None:
    same_band = make_hashes(1, 1, 400, 20)
    same_band[:, 0] = 7
    same_band = np.unique(same_band, axis=0)
    pairs = find_pairs(same_band, max_distance=15, max_bucket=100)
    assert pairs.num_passed_over == len(same_band) > 300
    assert as_dict(pairs).items() < compare_all(same_band, 15).items()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_clusters=st.integers(1, 6), spread=st.integers(0, 30), share=st.floats(0, 1))
def test_groups_are_no_wider_than_a_pair_and_stay_when_hashes_are_added(
    seed: int, num_clusters: int, spread: int, share: float
) -> None:
    hashes = np.random.default_rng(seed).permutation(make_hashes(seed, num_clusters, 8, spread))
    near = compare_all(hashes, 20)
    representative, distance = choose_representatives(len(hashes), find_pairs(hashes, max_distance=20))
    for index, own in enumerate(representative.tolist()):
        assert representative[own] == own <= index
        assert distance[index] == (near[own, index] if own < index else 0)
        if own == index:
            assert not any(representative[other] == other and (other, index) in near for other in range(index))
    num = int(share * len(hashes))
    before, _ = choose_representatives(num, find_pairs(hashes[:num], max_distance=20))
    assert before.tolist() == representative[:num].tolist()


def test_a_search_stops_when_asked() -> None:
    def check_stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_pairs(make_hashes(2, 5, 5, 3), max_distance=10, check_stop=check_stop)
