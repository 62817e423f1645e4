"""Find stage: what a finder found in each usable image, one row an image, also where it found nothing.

Does not know how a finder finds. It reads no table but the images', so that a new selection asks no finder again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.engines import Engine
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Finding, Image
from pipeline.sections import Plugin, PluginChoice, Run, key
from pipeline.validation import Section
from stages.finders import Find, FinderInput, load_finder
from stages.text.prompts import derive_seed, map_with_context

NAMED = True
PLUGINS = PluginChoice(package="stages.finders")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of `[find.NAME]` that every kind has."""

    max_error_share: float | None = key(None, "overrides the run's max_error_share", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class FindSection(Config):
    """A parsed section: the common keys and those of the finder."""

    finder: Plugin


def read_section(section: Section) -> FindSection:
    """
    Raises:
        ConfigError: the kind is unknown, or a key belongs to neither the stage nor the finder.
    """
    config, plugin = section.parse_with_plugin(Config, PLUGINS)
    return FindSection(**vars(config), finder=plugin)


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each `[find.NAME]`.

    Raises:
        ConfigError: a section names something that does not exist, or a package that it needs is not installed.
    """
    for name, config in run.sections["find"].items():
        finder = load_finder(config.finder, run=run.file.parent, field=f"{run.file}: find.{name}")
        yield Pass(
            stage="find",
            name=name,
            folder=f"finding/{name}",
            reads=("image",),
            engines=tuple(finder.engine_names.values()),
            shows_images=bool(finder.engine_names),
            version=VERSION,
            slice=finder.slice(run, field=f"find.{name}"),
            record=Finding,
            max_error_share=run.resolve_error_share(config.max_error_share),
            inputs=partial(inputs, name=name, seed=run.seed),
            work=partial(work, name=name, find=finder.find),
        )


def inputs(shard: Shard, *, name: str, seed: int) -> Iterator[FinderInput]:
    """The images of a shard that are ok, in key order."""
    for image in shard.read_table("image", Image):
        if image.status == "ok":
            image_seed = derive_seed(seed, image.key, name, *shard.retry_of)
            yield FinderInput(image=image, data=partial(shard.read_image, image), seed=image_seed)


def work(inputs: Iterator[FinderInput], engines: Mapping[str, Engine], *, name: str, find: Find) -> Iterator[Finding]:
    pairs = ((item, item) for item in inputs)
    for item, result in map_with_context(partial(find, engines=engines), pairs):
        yield Finding(key=item.image.key, name=name, **vars(result))
