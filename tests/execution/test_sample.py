"""Random images of a plan."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RefusedError
from pipeline.execution.sample import NUM_FILES, draw_pieces
from pipeline.records import Piece

lengths = st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any)


@given(lengths, st.integers(1, 30), st.integers())
def test_images_are_drawn_once_each_in_the_order_of_the_plan(lengths: list[int], num: int, seed: int) -> None:
    pieces = [Piece(file=str(n), start=3, stop=3 + length) for n, length in enumerate(lengths)]
    drawn = draw_pieces(pieces, num, random=Random(seed))
    images = [(int(piece.file), piece.start) for piece in drawn]
    assert images == sorted(set(images)) and len(images) == min(num, sum(lengths))
    assert all(3 <= start < 3 + lengths[file] for file, start in images)


def test_every_image_is_equally_likely() -> None:
    pieces = [Piece(file="a", stop=1), Piece(file="b", stop=9)]
    drawn = Counter(piece.file for seed in range(2000) for piece in draw_pieces(pieces, 1, random=Random(seed)))
    assert 150 < drawn["a"] < 250


@pytest.mark.slow
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 99), st.integers())
def test_files_of_unknown_length_give_ranges_of_a_few_of_them(sizes: list[int], num: int, seed: int) -> None:
    pieces = [Piece(file=str(n), num_bytes=size) for n, size in enumerate(sizes)]
    drawn = draw_pieces(pieces, num, random=Random(seed))
    assert len({piece.file for piece in drawn}) == len(drawn) == min(NUM_FILES, num, len(sizes))
    assert num <= sum(piece.num_samples or 0 for piece in drawn) < num + NUM_FILES
    assert all(piece.start * 400_000 <= (piece.num_bytes or 0) for piece in drawn)


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(RefusedError, match="no images"):
        draw_pieces([], 3, random=Random(0))
