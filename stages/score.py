"""Score stage: one score for each usable caption of the passes that a section names.

Does not know how a scorer rates a caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.execution.sharing import asked_folder, share_rows, shares_rows
from pipeline.records import Caption, Image, ImageRubric, Score, column_names
from pipeline.sections import Plugin, PluginChoice, Run, key
from pipeline.validation import Section
from stages import scorers
from stages.scorers import Sample, Scorer
from stages.text.prompts import derive_seed, map_with_context

NAMED = True
PLUGINS = PluginChoice(package="stages.scorers")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of `[score.NAME]` that every kind has."""

    captions: tuple[str, ...] | None = key(None, "the caption passes to score; default: all")
    max_error_share: float | None = key(None, "overrides the run's max_error_share", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class ScoreSection(Config):
    """A parsed section: the common keys and those of the scorer."""

    scorer: Plugin


def read_section(section: Section) -> ScoreSection:
    """
    Raises:
        ConfigError: the kind is unknown, or a key belongs to neither the stage nor the scorer.
    """
    common = frozenset(column_names(Config))
    plugin = section.plugin(PLUGINS, common=common)
    return ScoreSection(**vars(section.select_keys(common).parse(Config)), scorer=plugin)


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each `[score.NAME]` and caption pass.

    Raises:
        ConfigError: a section names something that does not exist.
    """
    for name, config in run.sections["score"].items():
        scorer = scorers.load_scorer(config.scorer, run=run.file.parent, field=f"{run.file}: score.{name}")
        if scorer.rubric and scorer.rubric not in (known := sorted(run.sections["rubric"])):
            raise ConfigError(f"{run.file}: score.{name}.rubric", plugins.explain_unknown(scorer.rubric, known))
        for caption in _list_captions(run, name, config):
            p = _build_pass(run, name, caption, config, scorer)
            yield from share_rows(p) if shares_rows(run) else (p,)


def inputs(shard: Shard, *, name: str, caption: str, rubric: str, seed: int) -> Iterator[Sample]:
    """The captions of pass `caption` that are ok, in order; of those that images share, one."""
    images = shard.read_table("image", Image)
    rubrics = shard.lookup(f"rubric/{rubric}", ImageRubric) if rubric else None
    usable = (row for row in shard.read_table(find_captions(shard.run, caption), Caption) if row.status == "ok")
    for image_key, candidates in groupby(usable, lambda row: row.key):
        image = next(image for image in images if image.key == image_key)
        rows = rubrics(image_key) if rubrics else ()
        criteria = next((row.criteria for row in rows if row.status != "error"), None)
        for row in candidates:
            yield Sample(
                key=row.key,
                candidate=row.candidate,
                text=row.text,
                alt_text=image.alt_text,
                source_key=image.source_key,
                data=partial(shard.read_image, image),
                seed=derive_seed(seed, row.key, name, caption, row.candidate, *shard.retry_of),
                rubric_criteria=criteria,
            )


def work(
    samples: Iterator[Sample], engines: Mapping[str, Engine], *, name: str, caption: str, scorer: Scorer
) -> Iterator[Score]:
    pairs = ((sample, sample) for sample in samples)
    for sample, result in map_with_context(partial(scorer.score, engines=engines), pairs):
        yield Score(key=sample.key, caption=caption, candidate=sample.candidate, name=name, **vars(result))


def find_captions(run: Run, caption: str) -> str:
    """The folder of the captions to score: those that an engine was asked for."""
    folder = f"caption/{caption}"
    return asked_folder(folder) if shares_rows(run) else folder


def _list_captions(run: Run, name: str, config: ScoreSection) -> tuple[str, ...]:
    known = tuple(run.sections["caption"])
    for caption in config.captions or ():
        if caption not in known:
            raise ConfigError(f"{run.file}: score.{name}.captions", plugins.explain_unknown(caption, sorted(known)))
    return config.captions or known


def _build_pass(run: Run, name: str, caption: str, config: ScoreSection, scorer: Scorer) -> Pass:
    return Pass(
        stage="score",
        name=name,
        caption=caption,
        folder=f"score/{name}/{caption}",
        reads=("image", *([f"rubric/{scorer.rubric}"] if scorer.rubric else []), find_captions(run, caption)),
        engines=scorer.engines,
        shows_images=scorer.shows_images,
        version=VERSION,
        slice=scorer.slice(run, field=f"score.{name}"),
        record=Score,
        max_error_share=run.resolve_error_share(config.max_error_share),
        inputs=partial(inputs, name=name, caption=caption, rubric=scorer.rubric, seed=run.seed),
        work=partial(work, name=name, caption=caption, scorer=scorer),
    )
