"""Boxes and tags as corpora and models write them, as things found.

Boxes are a list of four numbers each, a list of objects, or an object of lists, one for each key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.records import Found
from stages.finders import encode_other, scale_box

NAMES: Mapping[str, tuple[str, ...]] = {  # of a thing -> the keys that may hold it, the first that is there
    "label": ("label", "category", "class", "name"),
    "box": ("box", "bbox"),
    "text": ("text",),
    "confidence": ("confidence", "score"),
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How the boxes of an image are written."""

    size: tuple[float, float]  # width and height of the picture in the boxes' unit
    corners: str = "xyxy"  # or xywh, cxcywh
    orientation: int = 1  # EXIF, of the picture that they are of: 1 for the one displayed

    def locate(self, box: Sequence[float]) -> dict[str, Any]:
        """The columns of a box, as shares of the picture as displayed."""
        a, b, c, d = box
        if self.corners == "cxcywh":
            a, b = a - c / 2, b - d / 2
        if self.corners != "xyxy":
            c, d = a + c, b + d
        width, height = self.size
        corners = [turn_point(x / width, y / height, self.orientation) for x, y in ((a, b), (c, d))]
        return scale_box((*corners[0], *corners[1]), 1, 1)


def turn_point(x: float, y: float, orientation: int) -> tuple[float, float]:
    """A point of the stored picture in the displayed one, both as shares, by the EXIF orientation, 1 to 8."""
    if orientation >= 5:
        x, y = y, x
    return (1 - x if orientation in (2, 3, 6, 7) else x), (1 - y if orientation in (3, 4, 7, 8) else y)


def find_value(metadata: str, path: str) -> Any:
    """The value at a path of keys; None if there is none."""
    value = json.loads(metadata)
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def list_boxes(value: Any, frame: Frame, *, path: str) -> Iterator[Found]:
    """
    Args:
        value: the boxes; None: there are none.
        frame: how they are written.
        path: of the value, for messages.

    Raises:
        ValueError: it is no list of boxes.
    """
    for number, item in enumerate(list_objects(value, path)):
        rest = dict(item) if isinstance(item, dict) else {"box": item}
        label, box, text, confidence = (
            next((rest.pop(key) for key in keys if rest.get(key) is not None), None) for keys in NAMES.values()
        )
        if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            raise ValueError(f"{path}: number {number} has the box {box!r}, which is not four numbers")
        if confidence is not None and not is_number(confidence):
            raise ValueError(f"{path}: number {number} has the confidence {confidence!r}, which is no number")
        yield Found(
            label="" if label is None else str(label).strip(),
            text=None if text is None else str(text),
            confidence=None if confidence is None else min(1.0, max(0.0, float(confidence))),
            other=encode_other(rest),
            **({} if box is None else frame.locate(box)),
        )


def list_objects(value: Any, path: str) -> list[Any]:
    """The objects or boxes of a list, or of an object of lists of one length.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, dict):
        lists = {name: column for name, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in lists.values()}) > 1:
            raise ValueError(f"{path}: its lists {', '.join(lists)} have different lengths")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{path}: {value!r} is no list of boxes")
    return value or []


def list_tags(value: Any, *, path: str) -> Iterator[Found]:
    """
    Raises:
        ValueError: it is neither a list of tags nor a text.
    """
    if not isinstance(value, list | str | None):
        raise ValueError(f"{path}: {value!r} is neither a list of tags nor a text")
    tags = value.split(",") if isinstance(value, str) else value or []
    yield from (Found(label=str(tag).strip()) for tag in tags if str(tag).strip())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
