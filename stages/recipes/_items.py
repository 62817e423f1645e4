"""Parts of a picture that a step of a recipe goes through: tiles, and boxes with a margin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stages.text.chains import Box

OVERLAP = 0.2  # of a tile's side that it shares with its neighbours, in all
MARGIN = 0.1  # of a thing's box, that is shown around it on each side
MIN_SIDE = 28  # pixels of what is shown of a thing
MAX_ASPECT = 20  # of what is shown of a thing: longer strips are widened


@dataclass(frozen=True, kw_only=True)
class Item:
    """One of the things that a step asks about."""

    text: str  # for {item}: a sentence, the name of a tile, what a thing is
    box: Box | None = None


def list_tiles(columns: int, rows: int) -> Iterator[Item]:
    """Tiles that cover the picture and overlap, row by row.

    >>> [(tile.text, tile.box) for tile in list_tiles(2, 1)]
    [('left', (0.0, 0.0, 0.6, 1.0)), ('right', (0.4, 0.0, 1.0, 1.0))]
    """
    across, down = _cut_side(columns, ("left", "right")), _cut_side(rows, ("top", "bottom"))
    for top, bottom, row in down:
        for left, right, column in across:
            name = " ".join(filter(None, (row, column))) or ("centre" if columns * rows > 1 else "whole")
            yield Item(text=name, box=(left, top, right, bottom))


def _cut_side(num: int, ends: tuple[str, str]) -> list[tuple[float, float, str]]:
    """The beginning, end and name of each of `num` overlapping parts of a side of length 1."""
    size = 1.0 if num == 1 else (1 + OVERLAP) / num
    step = 0.0 if num == 1 else (1 - size) / (num - 1)
    names = [""] * num
    if num in (2, 3):
        names[0], names[-1] = ends
    elif num > 3:
        names = [f"{'column' if ends[0] == 'left' else 'row'} {n} of {num}" for n in range(1, num + 1)]
    return [(round(n * step, 5), round(min(1.0, n * step + size), 5), name) for n, name in enumerate(names)]


def pad_box(box: Box, width: int, height: int) -> Box:
    """A box with a margin, at least MIN_SIDE pixels wide and high and no strip, cut to the picture.

    Args:
        box: in shares of the picture.
        width, height: of the picture in pixels.
    """
    sides = [(box[0] * width, box[2] * width, width), (box[1] * height, box[3] * height, height)]
    lengths = [(end - start) * (1 + 2 * MARGIN) for start, end, _ in sides]
    least = max(MIN_SIDE, max(lengths) / MAX_ASPECT)
    left, right, top, bottom = (
        min(1.0, max(0.0, (middle + sign * max(length, least) / 2) / whole))
        for (start, end, whole), length in zip(sides, lengths, strict=True)
        for middle in ((start + end) / 2,)
        for sign in (-1, 1)
    )
    return (round(left, 5), round(top, 5), round(right, 5), round(bottom, 5))
