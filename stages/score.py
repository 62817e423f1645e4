"""Decides which captions a scorer sees: every usable one of the passes that its section names, with its image.

It does not know how a caption is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass
from pipeline.execution.shard import Shard
from pipeline.records import Caption, Image, ImageRubric, RubricCriterion, Score, column_names
from pipeline.sections import Plugin, PluginChoice, Run, key
from pipeline.validation import Section
from stages import scorers
from stages.scorers import Sample, Scorer, ScoreResult
from stages.text.prompts import derive_seed, map_with_context

NAMED = True
PLUGINS = PluginChoice(package="stages.scorers")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[score.NAME]`, whatever its kind."""

    captions: tuple[str, ...] | None = key(None, "the caption passes that it scores; by default all")
    max_error_share: float | None = key(None, "in the place of the run's", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Scored(Config):
    """A section, read: the common keys and the scorer's own."""

    scorer: Plugin


def read_section(section: Section) -> Scored:
    """
    Raises:
        ConfigError: the kind is unknown, or a key fits neither the stage nor the scorer.
    """
    common = frozenset(column_names(Config))
    plugin = section.plugin(PLUGINS, common=common)
    return Scored(**vars(section.select_keys(common).parse(Config)), scorer=plugin)


def passes(run: Run) -> Iterable[Pass]:
    """One for each `[score.NAME]` and caption pass.

    Raises:
        ConfigError: a section names what is not there.
    """
    for name, config in run.sections["score"].items():
        scorer = scorers.load_scorer(config.scorer, run=run.file.parent, field=f"{run.file}: score.{name}")
        _check_rubric(run, name, scorer.rubric)
        for caption in _captions(run, name, config):
            yield _pass(run, name, caption, config, scorer)


def inputs(shard: Shard, *, name: str, caption: str, rubric: str, seed: int) -> Iterator[Sample]:
    """The captions to be marked: those of pass `caption` that are ok, in their order."""
    images = shard.read_table("image", Image)
    rubrics = shard.lookup(f"rubric/{rubric}", ImageRubric) if rubric else None
    rows = (row for row in shard.read_table(f"caption/{caption}", Caption) if row.status == "ok")
    for image_key, candidates in groupby(rows, lambda row: row.key):
        image = next(image for image in images if image.key == image_key)
        asked = _asked(rubrics(image_key)) if rubrics else None
        for row in candidates:
            yield Sample(
                key=row.key,
                candidate=row.candidate,
                text=row.text,
                alt_text=image.alt_text,
                source_key=image.source_key,
                data=partial(shard.read_image, image),
                seed=derive_seed(seed, row.key, name, caption, row.candidate, *shard.retry_of),
                rubric_criteria=asked,
            )


def _asked(found: Sequence[ImageRubric]) -> tuple[RubricCriterion, ...] | None:
    """The criteria of an image's rubric; None where nobody could write one."""
    return next((rubric.criteria for rubric in found if rubric.status != "error"), None)


def work(
    samples: Iterator[Sample], engines: Mapping[str, Engine], *, name: str, caption: str, scorer: Scorer
) -> Iterator[Score]:
    for sample, mark in map_with_context(
        partial(scorer.score, engines=engines), ((sample, sample) for sample in samples)
    ):
        yield _row(sample, mark, name=name, caption=caption)


def _row(sample: Sample, mark: ScoreResult, *, name: str, caption: str) -> Score:
    return Score(key=sample.key, caption=caption, candidate=sample.candidate, name=name, **vars(mark))


def _captions(run: Run, name: str, config: Scored) -> tuple[str, ...]:
    known = tuple(run.sections["caption"])
    for caption in config.captions or ():
        if caption not in known:
            raise ConfigError(f"{run.file}: score.{name}.captions", plugins.explain_unknown(caption, sorted(known)))
    return config.captions or known


def _check_rubric(run: Run, name: str, rubric: str) -> None:
    if rubric and rubric not in (known := sorted(run.sections["rubric"])):
        raise ConfigError(f"{run.file}: score.{name}.rubric", plugins.explain_unknown(rubric, known))


def _pass(run: Run, name: str, caption: str, config: Scored, scorer: Scorer) -> Pass:
    return Pass(
        stage="score",
        name=name,
        caption=caption,
        folder=f"score/{name}/{caption}",
        reads=("image", *([f"rubric/{scorer.rubric}"] if scorer.rubric else []), f"caption/{caption}"),
        engines=scorer.engines,
        version=VERSION,
        slice=scorer.slice(run, field=f"score.{name}"),
        record=Score,
        max_error_share=run.max_error_share if config.max_error_share is None else config.max_error_share,
        inputs=partial(inputs, name=name, caption=caption, rubric=scorer.rubric, seed=run.seed),
        work=partial(work, name=name, caption=caption, scorer=scorer),
    )
