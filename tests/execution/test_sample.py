"""Random images of a plan."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RefusedError
from pipeline.execution.sample import NUM_FILES, draw_pieces, split_pieces
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


def test_an_empty_file_is_not_drawn_beside_others() -> None:
    """It took as many draws as the others have bytes."""
    sizes = [0, 3 * 10**9, 0, 5_000]
    pieces = [Piece(file=f"{n}.tar", start=0, stop=None, num_bytes=size) for n, size in enumerate(sizes)]
    drawn = draw_pieces(pieces, 8, random=Random(0))
    assert [piece.file for piece in drawn] == ["1.tar", "3.tar"]
    assert len(draw_pieces(pieces[:1], 8, random=Random(0))) == 1


def test_large_files_are_drawn_first() -> None:
    pieces = [Piece(file=f"{n}.tar", start=0, stop=None, num_bytes=10**6 if n else 10**9) for n in range(100)]
    drawn = [{piece.file for piece in draw_pieces(pieces, 8, random=Random(n))} for n in range(50)]
    assert all(len(files) == 8 for files in drawn) and sum("0.tar" in files for files in drawn) > 45


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 12))
def test_pieces_are_split_by_their_images(sizes: list[int], num: int) -> None:
    pieces = [Piece(file=f"{n}.tar", start=n, stop=n + size, num_bytes=9) for n, size in enumerate(sizes)]
    images = [(piece.file, n) for piece in pieces for n in range(piece.start, piece.stop or 0)]
    parts = [[(p.file, n) for p in part for n in range(p.start, p.stop or 0)] for part in split_pieces(pieces, num)]
    assert parts == ([images[:num], images[num:]] if len(images) > num else [[], images])
