"""Random images of a plan."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RefusedError
from pipeline.execution.sample import NUM_RANGES, SampleCounter, draw_pieces, split_pieces
from pipeline.records import Piece
from pipeline.sections import Plugin

UNKNOWN = SampleCounter(Plugin(kind="none", module=ModuleType("none"), config=None))  # counts nothing
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any)


@given(lengths, st.integers(1, 30), st.integers())
def test_images_are_drawn_once_each_in_the_order_of_the_plan(lengths: list[int], num: int, seed: int) -> None:
    pieces = [Piece(file=str(n), start=3, stop=3 + length) for n, length in enumerate(lengths)]
    drawn = draw_pieces(pieces, num, random=Random(seed), counter=UNKNOWN)
    images = [(int(piece.file), piece.start) for piece in drawn]
    assert images == sorted(set(images)) and len(images) == min(num, sum(lengths))
    assert all(3 <= start < 3 + lengths[file] for file, start in images)


def test_every_image_is_equally_likely() -> None:
    pieces = [Piece(file="a", stop=1), Piece(file="b", stop=9)]
    drawn = Counter(
        piece.file for seed in range(2000) for piece in draw_pieces(pieces, 1, random=Random(seed), counter=UNKNOWN)
    )
    assert 150 < drawn["a"] < 250


@pytest.mark.slow
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 99), st.integers())
def test_files_of_unknown_length_give_ranges_of_a_few_of_them(sizes: list[int], num: int, seed: int) -> None:
    pieces = [Piece(file=str(n), num_bytes=size) for n, size in enumerate(sizes)]
    drawn = draw_pieces(pieces, num, random=Random(seed), counter=UNKNOWN)
    assert len({piece.file for piece in drawn}) == len(drawn) == min(NUM_RANGES, num, len(sizes))
    assert num <= sum(piece.num_samples or 0 for piece in drawn) < num + NUM_RANGES
    assert all(piece.start * 400_000 <= (piece.num_bytes or 0) for piece in drawn)


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(RefusedError, match="no images"):
        draw_pieces([], 3, random=Random(0), counter=UNKNOWN)


def test_an_empty_file_is_not_drawn_beside_others() -> None:
    """It took as many draws as the others have bytes."""
    sizes = [0, 3 * 10**9, 0, 5_000]
    pieces = [Piece(file=f"{n}.tar", start=0, stop=None, num_bytes=size) for n, size in enumerate(sizes)]
    drawn = draw_pieces(pieces, 8, random=Random(0), counter=UNKNOWN)
    assert [piece.file for piece in drawn] == ["1.tar", "3.tar"]
    assert len(draw_pieces(pieces[:1], 8, random=Random(0), counter=UNKNOWN)) == 1


def count_by_size(known: float = 1.0) -> SampleCounter:
    """A source whose files have a sample a byte, and counts only the smaller ones."""
    module = ModuleType("counted")
    module.count = lambda piece, config: piece.num_bytes if piece.num_bytes <= known * 10**9 else None  # type: ignore[attr-defined]
    return SampleCounter(Plugin(kind="counted", module=module, config=None))


@pytest.mark.slow
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any), st.integers(1, 99), st.integers())
def test_counted_files_give_as_many_images_as_are_wanted_none_twice(sizes: list[int], num: int, seed: int) -> None:
    pieces = [Piece(file=f"{n:02d}", start=2, num_bytes=size + 2 if size else 0) for n, size in enumerate(sizes)]
    drawn = draw_pieces(pieces, num, random=Random(seed), counter=count_by_size())
    images = [(piece.file, n) for piece in drawn for n in range(piece.start, piece.stop or 0)]
    assert len(images) == len(set(images)) and images == sorted(images)
    assert min(num, sum(sizes)) <= len(images) <= num
    assert all(2 <= at < sizes[int(file)] + 2 for file, at in images)


def test_every_part_of_a_counted_file_is_drawn() -> None:
    """It took one range of the first images where images are small."""
    piece, positions = Piece(file="a.tar", num_bytes=1000), Counter[int]()
    for seed in range(400):
        for part in draw_pieces([piece], 16, random=Random(seed), counter=count_by_size()):
            positions.update(n // 100 for n in range(part.start, part.stop or 0))
    assert set(positions) == set(range(10)) and max(positions.values()) < 1.3 * min(positions.values())


def test_what_was_drawn_before_is_not_drawn_again() -> None:
    piece, drawn = Piece(file="a.tar", num_bytes=40), list[Piece]()
    for seed in range(9):
        drawn += draw_pieces([piece], 8, random=Random(seed), counter=count_by_size(), without=drawn)
    images = [n for part in drawn for n in range(part.start, part.stop or 0)]
    assert len(images) == len(set(images)) > 16


def test_large_files_are_drawn_first() -> None:
    pieces = [Piece(file=f"{n}.tar", start=0, stop=None, num_bytes=10**6 if n else 10**9) for n in range(100)]
    drawn = [{piece.file for piece in draw_pieces(pieces, 8, random=Random(n), counter=UNKNOWN)} for n in range(50)]
    assert all(len(files) == 8 for files in drawn) and sum("0.tar" in files for files in drawn) > 45


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 12))
def test_pieces_are_split_by_their_images(sizes: list[int], num: int) -> None:
    pieces = [Piece(file=f"{n}.tar", start=n, stop=n + size, num_bytes=9) for n, size in enumerate(sizes)]
    images = [(piece.file, n) for piece in pieces for n in range(piece.start, piece.stop or 0)]
    parts = [[(p.file, n) for p in part for n in range(p.start, p.stop or 0)] for part in split_pieces(pieces, num)]
    assert parts == ([images[:num], images[num:]] if len(images) > num else [[], images])
