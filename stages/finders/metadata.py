"""Finder `metadata`: boxes and tags that the corpus has in its metadata, and the EXIF of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.decoding.images import read_exif
from pipeline.engines import Engine
from pipeline.records import Found, Image
from pipeline.sections import key
from stages.finders import FinderInput, FinderResult
from stages.finders._annotations import Frame, find_value, list_boxes, list_tags


@dataclass(frozen=True, kw_only=True)
class Config:
    boxes: str = key("", "the metadata's key with a list of boxes, or of objects with a box; dots go deeper")
    tags: str = key("", "the metadata's key with tags: a list, or a text with commas; dots go deeper")
    exif: bool = key(True, "also the fields of the file's EXIF, whose names are the labels")
    corners: Literal["xyxy", "xywh", "cxcywh"] = key("xyxy", "what the four numbers of a box are")
    unit: Literal["pixel", "share", "percent"] = key("pixel", "of those numbers")
    upright: bool = key(True, "boxes are of the picture as displayed; false: as stored, before EXIF turns it")

    def __post_init__(self) -> None:
        if not (self.boxes or self.tags or self.exif):
            raise ValueError("there is nothing to find: set boxes or tags, or exif = true")


def find(inputs: Iterable[FinderInput], settings: Config, engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
    for item in inputs:
        try:
            yield FinderResult(found=tuple(list_found(item, settings)))
        except ValueError as error:
            yield FinderResult(status="invalid", error=str(error))


def list_found(item: FinderInput, settings: Config) -> Iterator[Found]:
    """
    Raises:
        ValueError: the metadata has something else there than boxes or tags.
    """
    metadata = item.image.metadata
    if settings.boxes:
        frame, path = build_frame(item.image, settings), f"metadata.{settings.boxes}"
        yield from list_boxes(find_value(metadata, settings.boxes), frame, path=path)
    if settings.tags:
        yield from list_tags(find_value(metadata, settings.tags), path=f"metadata.{settings.tags}")
    if settings.exif:
        yield from (Found(label=name, text=text) for name, text in read_exif(item.data()).items())


def build_frame(image: Image, settings: Config) -> Frame:
    orientation = 1 if settings.upright else image.orientation or 1
    width, height = image.width or 1, image.height or 1  # as displayed
    stored = (height, width) if orientation >= 5 else (width, height)
    size = {"pixel": stored, "share": (1, 1), "percent": (100, 100)}[settings.unit]
    return Frame(size=size, corners=settings.corners, orientation=orientation)
