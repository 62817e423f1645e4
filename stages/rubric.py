"""Decides who is heard about an image: a committee of teachers and the student, from their caption passes.

One rubric for each image of which the student has a usable caption. It does not know how a rubric is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import ModuleType
from typing import Any

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Pass
from pipeline.execution.shard import Shard
from pipeline.records import Caption, Image, ImageRubric
from pipeline.sections import Run, key, stamped
from stages.rubric_writers import Evidence, WrittenRubric, count_majority
from stages.text.prompts import derive_seed, engine_slice, map_where

NAMED = True
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[rubric.NAME]`."""

    teachers: tuple[str, ...] = key(help="the committee: caption passes; of each the first usable candidate is heard")
    student: str = key(help="the caption pass that is held against them, all of its candidates")
    writer: str = key("claims", "who writes: a module of writers/, or one of your own with a dot")
    engine: str = key("", "the model that writes, where the writer asks one: a name in [engines]")
    words: str = key("", "what that model is asked: a file of writers/, your own or one that ships")
    agree: int = key(0, "so many teachers make the committee's word; 0: at least half of them", least=0)
    max_error_share: float | None = key(None, "in the place of the run's", stamp=False, least=0, most=1)

    def __post_init__(self) -> None:
        if not self.teachers or len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teachers are {list(self.teachers)}; there is at least one, and none twice")
        if self.student in self.teachers:
            raise ValueError(f"student is {self.student!r}, one of its own teachers")
        if self.agree > len(self.teachers):
            raise ValueError(f"agree = {self.agree} is more than the {len(self.teachers)} teachers")


@dataclass(frozen=True, kw_only=True)
class RubricWork:
    """A pass of the rubric stage, with all that its rows need."""

    name: str
    writer: str
    module: ModuleType
    settings: Any

    def work(self, inputs: Iterator[Evidence], engines: Mapping[str, Engine]) -> Iterator[ImageRubric]:
        """In order. Where too few teachers were heard, the writer is not asked."""
        write = partial(self.module.write, settings=self.settings, engines=engines)
        for evidence, written in map_where(write, inputs, _is_enough):
            yield self._row(evidence, written or _without(evidence))

    def _row(self, evidence: Evidence, written: WrittenRubric) -> ImageRubric:
        num = len(evidence.teachers)
        return ImageRubric(key=evidence.key, name=self.name, writer=self.writer, num_teachers=num, **vars(written))


def passes(run: Run) -> Iterable[Pass]:
    """One for each `[rubric.NAME]`.

    Raises:
        ConfigError: a section names what is not there.
    """
    return [_pass(run, name, config) for name, config in run.sections["rubric"].items()]


def inputs(shard: Shard, *, name: str, config: Config, seed: int) -> Iterator[Evidence]:
    """What was said of every image of which the student has a usable caption, in key order."""
    images = shard.read_table("image", Image)
    teachers = [shard.lookup(f"caption/{teacher}", Caption) for teacher in config.teachers]
    usable = (row for row in shard.read_table(f"caption/{config.student}", Caption) if row.status == "ok")
    for image_key, candidates in groupby(usable, lambda row: row.key):
        image = next(image for image in images if image.key == image_key)
        said = [text for teacher in teachers if (text := _first(teacher(image_key))) is not None]
        yield Evidence(
            key=image_key,
            teachers=tuple(said),
            student=tuple(row.text for row in candidates),
            num_agree=config.agree or count_majority(len(config.teachers)),
            alt_text=image.alt_text,
            source_key=image.source_key,
            data=partial(shard.read_image, image),
            seed=derive_seed(seed, image_key, name, *shard.retry_of),
        )


def _first(rows: Iterable[Caption]) -> str | None:
    return next((row.text for row in rows if row.status == "ok"), None)


def _without(evidence: Evidence) -> WrittenRubric:
    num = len(evidence.teachers)
    why = f"{num} of its teachers have a usable caption, and {evidence.num_agree} must agree"
    return WrittenRubric(status="empty", error=why)


def _is_enough(evidence: Evidence) -> bool:
    return len(evidence.teachers) >= evidence.num_agree


def _pass(run: Run, name: str, config: Config) -> Pass:
    field = f"{run.file}: rubric.{name}"
    _check_captions(run, config, field)
    try:
        module = plugins.load("stages.rubric_writers", config.writer)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.writer", str(error)) from error
    settings = module.prepare(config, run=run.file.parent, field=field)
    engines = tuple(module.engines(settings))
    work: Callable[..., Iterator[ImageRubric]] = RubricWork(
        name=name, writer=config.writer, module=module, settings=settings
    ).work
    return Pass(
        stage="rubric",
        name=name,
        folder=f"rubric/{name}",
        reads=(*(f"caption/{caption}" for caption in (config.student, *config.teachers)), "image"),
        engines=engines,
        version=VERSION,
        slice={
            "teachers": list(config.teachers),
            "student": config.student,
            "agree": config.agree,
            "writer": {"name": config.writer, "version": getattr(module, "VERSION", 1), **stamped(settings)},
            **_asked(run, name, engines),
        },
        record=ImageRubric,
        max_error_share=run.max_error_share if config.max_error_share is None else config.max_error_share,
        inputs=partial(inputs, name=name, config=config, seed=run.seed),
        work=work,
    )


def _check_captions(run: Run, config: Config, field: str) -> None:
    known = sorted(run.sections["caption"])
    for name, captions in (("teachers", config.teachers), ("student", (config.student,))):
        for caption in captions:
            if caption not in known:
                raise ConfigError(f"{field}.{name}", plugins.explain_unknown(caption, known))


def _asked(run: Run, name: str, engines: Iterable[str]) -> dict[str, Any]:
    """The seed decides something only where a model is asked."""
    found = [engine_slice(run, engine, field=f"rubric.{name}.engine") for engine in engines]
    return {"seed": run.seed, "engines": found} if found else {}
