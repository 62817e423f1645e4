"""Rubric stage: one rubric for each image with a usable caption of the student.

Collects the captions of a committee of teachers and of the student; does not know how a writer uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Caption, Image, ImageRubric
from pipeline.sections import Run, key, stamped
from stages.rubric_writers import Evidence, WrittenRubric, count_majority
from stages.text.given import GivenTexts, OpenFields, fill_fields
from stages.text.prompts import derive_seed, engine_slice, map_where

NAMED = True
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[rubric.NAME]`."""

    teachers: tuple[str, ...] = key(help="the committee: caption passes; the first usable candidate of each counts")
    student: str = key(help="the caption pass compared with them, with all of its candidates")
    writer: str = key("claims", "claims, statements (claims, each once), llm, or a module of your own with a dot")
    engine: str = key("", "the model of a writer that uses one: a name in [engines]")
    words: str = key("", "its prompt: a file of writers/, your own or one that ships")
    agree: int = key(0, "the number of teachers that must agree; 0: at least half of them", least=0)
    given: Mapping[str, str] = key(
        factory=dict,
        help='FIELD = "SQL" that fills {FIELD} of the writer\'s prompt, as `given` of a caption pass does',
        in_init=False,
    )
    max_error_share: float | None = key(None, "overrides the run's max_error_share", stamp=False, least=0, most=1)

    def __post_init__(self) -> None:
        if not self.teachers or len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teachers is {list(self.teachers)}; it must name at least one pass, each once")
        if self.student in self.teachers:
            raise ValueError(f"student is {self.student!r}, which is one of the teachers too")
        if self.agree > len(self.teachers):
            raise ValueError(f"agree = {self.agree} is more than the {len(self.teachers)} teachers")


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each `[rubric.NAME]`.

    Raises:
        ConfigError: a section names something that does not exist.
    """
    return [_build_pass(run, name, config) for name, config in run.sections["rubric"].items()]


def inputs(shard: Shard, *, name: str, config: Config, seed: int, given: GivenTexts) -> Iterator[Evidence]:
    """The captions of every image of which the student has a usable one, in key order."""
    images = shard.read_table("image", Image)
    find_texts = given.open(shard)
    lookups = [shard.lookup(f"caption/{teacher}", Caption) for teacher in config.teachers]
    usable = (row for row in shard.read_table(f"caption/{config.student}", Caption) if row.status == "ok")
    for image_key, candidates in groupby(usable, lambda row: row.key):
        image = next(image for image in images if image.key == image_key)
        first_usable = (next((row for row in lookup(image_key) if row.status == "ok"), None) for lookup in lookups)
        yield Evidence(
            key=image_key,
            teachers=tuple(row.text for row in first_usable if row is not None),
            student=tuple(row.text for row in candidates),
            num_agree=config.agree or count_majority(len(config.teachers)),
            alt_text=image.alt_text,
            texts=find_texts(image_key),
            source_key=image.source_key,
            data=partial(shard.read_image, image),
            seed=derive_seed(seed, image_key, name, *shard.retry_of),
        )


def work(
    inputs: Iterator[Evidence],
    engines: Mapping[str, Engine],
    *,
    name: str,
    writer: str,
    write: Callable[..., Iterator[WrittenRubric]],
) -> Iterator[ImageRubric]:
    """One rubric per input, in order. The writer gets only images with enough teachers."""
    write_all = partial(write, engines=engines)
    for evidence, written in map_where(write_all, inputs, lambda item: len(item.teachers) >= item.num_agree):
        num_teachers = len(evidence.teachers)
        if written is None:
            error = f"{num_teachers} of its teachers have a usable caption, and {evidence.num_agree} must agree"
            written = WrittenRubric(status="empty", error=error)
        yield ImageRubric(key=evidence.key, name=name, writer=writer, num_teachers=num_teachers, **vars(written))


def _build_pass(run: Run, name: str, config: Config) -> Pass:
    field = f"{run.file}: rubric.{name}"
    _check_captions(run, config, field)
    try:
        module = plugins.load("stages.rubric_writers", config.writer)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.writer", str(error)) from error
    settings = module.prepare(config, run=run.file.parent, field=field)
    open_fields = module.open_fields(settings) if hasattr(module, "open_fields") else OpenFields()
    given = fill_fields(run, open_fields, config.given, field=f"rubric.{name}.given")
    captions = [f"caption/{caption}" for caption in (config.student, *config.teachers)]
    engines = tuple(module.engines(settings))
    engine_slices = [engine_slice(run, engine, field=f"rubric.{name}.engine") for engine in engines]
    return Pass(
        stage="rubric",
        name=name,
        folder=f"rubric/{name}",
        reads=(*dict.fromkeys([*captions, *given.reads]), "image"),
        engines=engines,
        version=VERSION,
        slice={
            "teachers": list(config.teachers),
            "student": config.student,
            "agree": config.agree,
            "writer": {"name": config.writer, "version": getattr(module, "VERSION", 1), **stamped(settings)},
            # the seed decides something only where a model is used
            **({"given": dict(config.given)} if config.given else {}),
            **({"seed": run.seed, "engines": engine_slices} if engine_slices else {}),
        },
        record=ImageRubric,
        max_error_share=run.resolve_error_share(config.max_error_share),
        inputs=partial(inputs, name=name, config=config, seed=run.seed, given=given),
        work=partial(work, name=name, writer=config.writer, write=partial(module.write, settings=settings)),
    )


def _check_captions(run: Run, config: Config, field: str) -> None:
    known = sorted(run.sections["caption"])
    for name, captions in (("teachers", config.teachers), ("student", (config.student,))):
        for caption in captions:
            if caption not in known:
                raise ConfigError(f"{field}.{name}", plugins.explain_unknown(caption, known))
