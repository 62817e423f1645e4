"""Finders: modules that find things in images, one per file, named by `kind` in `[find.NAME]`.

The folder is the registry. A kind with a dot is a module of your own. A finder module has

- `Config`: a frozen dataclass of its keys in `[find.NAME]`, declared with `pipeline.sections.key`;
- `find(inputs, settings, engines) -> Iterator[FinderResult]`: one result per image, in order, lazily;

and where needed

- `prepare(config, *, run, field) -> settings`: loads the files that the keys name and checks the keys. Its result is
  passed to `find` in place of the config, and `pipeline.sections.stamped` of it goes into the fingerprint;
- `labels` of the settings, or of the config: the labels that can be found; a condition on another one is an error.
  None, or no such attribute: any label may be;
- `engines(settings) -> Mapping[str, str]`: for each key that names an engine, the name in `[engines]`;
- `VERSION`: an integer, raised when equal images get different results.

A finder knows no tables. What its file needs decoded, it decodes with `map_pictures`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.decoding.images import PixelRule, decode_pixels
from pipeline.decoding.probe_pool import map_ahead
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UndecodableError
from pipeline.machine import num_cores
from pipeline.records import FindingStatus, Found, Image
from pipeline.sections import Plugin
from stages.text.loaded import LoadedPlugin, prepare_plugin

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_PIXELS = 2**21  # at which pictures are looked at, unless a finder says otherwise


@dataclass(frozen=True, kw_only=True)
class FinderInput:
    """One image to look at."""

    image: Image
    data: Callable[[], bytes]  # reads the image file; only finders that look at the image call it
    seed: int = 0

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.image.key,)


@dataclass(frozen=True, kw_only=True)
class FinderResult:
    """What was found in one image. Unless its status is "ok", nothing is."""

    found: tuple[Found, ...] = ()
    status: FindingStatus = "ok"
    error: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0  # 0 when no engine was used
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        assert (self.error is None) == (self.status == "ok") >= bool(self.found), f"{self.status}: {self.error}"


Find = Callable[..., Iterator[FinderResult]]  # (inputs, engines=)


@dataclass(frozen=True, kw_only=True)
class Finder(LoadedPlugin):
    """A loaded finder with its settings."""

    def find(self, inputs: Iterable[FinderInput], engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
        results: Iterator[FinderResult] = self.module.find(inputs, self.settings, engines)
        return results


def load_finder(plugin: Plugin, *, run: Path | None, field: str) -> Finder:
    """Loads the finder of a section; finders/ of `run` override those that ship.

    Raises:
        ConfigError: as `prepare_plugin`.
    """
    return Finder(**vars(prepare_plugin(plugin, run=run, field=field)))


def require_packages(*packages: str, field: str, kind: str) -> None:
    """
    Raises:
        ConfigError: a package that a finder needs is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            advice = f"{kind!r} needs {package}, which is not installed: pip install '.[{kind}]' in a clone of recap"
            raise ConfigError(f"{field}.kind", advice)


def map_pictures(
    inputs: Iterable[FinderInput],
    find: Callable[[Picture], Iterable[Found]],
    *,
    package: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[FinderResult]:
    """What `find` finds in each picture, in order. Pictures are decoded, and `find` is called, in several threads.

    Args:
        inputs: the images.
        find: of an RGB picture, upright, on white, with at most `max_pixels`.
        package: the library that finds, which is recorded as the model with its version.
        max_pixels: larger pictures are reduced.

    Raises:
        OSError: an image file has gone.
        MachineError: there is too little memory.
    """
    result = partial(FinderResult, model=package, revision=version(package) if package else None)
    rule = PixelRule(max_pixels=max_pixels, min_pixels=1, factor=1)

    def find_one(data: bytes) -> FinderResult:
        try:
            return result(found=tuple(find(decode_pixels(data, rule))))
        except UndecodableError as error:
            return result(status="error", error=str(error))

    num_threads = num_cores()
    for found in map_ahead((item.data() for item in inputs), find_one, num_threads=num_threads, depth=2 * num_threads):
        if isinstance(found, Exception):
            raise found
        yield found


def scale_box(box: Iterable[float], width: float, height: float) -> dict[str, Any]:
    """The columns x0, y0, x1, y1 of a box, cut to the picture and in order; none where nothing of it is in the picture.

    >>> scale_box((10, 90, 50, 40), 100, 80)
    {'x0': 0.1, 'y0': 0.5, 'x1': 0.5, 'y1': 1.0}
    """
    ax, ay, bx, by = box
    x0, x1 = sorted(min(1.0, max(0.0, round(x / width, 5))) for x in (ax, bx))
    y0, y1 = sorted(min(1.0, max(0.0, round(y / height, 5))) for y in (ay, by))
    return {"x0": x0, "y0": y0, "x1": x1, "y1": y1} if x0 < x1 and y0 < y1 else {}


def encode_other(values: Mapping[str, Any]) -> str | None:
    """The JSON of everything else about something found; None if there is nothing."""
    return json.dumps(values, ensure_ascii=False) if values else None
