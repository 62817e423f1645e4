"""Score stage: one score for each usable caption of the passes that a section names.

Does not know how a scorer rates a caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass
from pipeline.execution.sharing import share_rows
from pipeline.records import Score
from pipeline.sections import Plugin, PluginChoice, Run, key
from pipeline.validation import Section
from stages.scorers import Sample, Scorer
from stages.scorers._samples import list_score_passes, read_samples
from stages.text.prompts import map_with_context

NAMED = True
PLUGINS = PluginChoice(package="stages.scorers")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of `[score.NAME]` that every kind has."""

    captions: tuple[str, ...] | None = key(None, "the caption passes to score; default: all")
    given: Mapping[str, str] = key(
        factory=dict,
        help='FIELD = "SQL" that fills {FIELD} of the rubric\'s prompt, as `given` of a caption pass does',
        in_init=False,
    )
    max_error_share: float | None = key(None, "overrides the run's max_error_share", stamp=False, least=0, most=1)
    min_detection: float | None = key(
        None,
        "with [canary]: an error if the judge notices significantly less than this share of a kind of planted error",
        stamp=False,
        least=0,
        most=1,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreSection(Config):
    """A parsed section: the common keys and those of the scorer."""

    scorer: Plugin


def read_section(section: Section) -> ScoreSection:
    """
    Raises:
        ConfigError: the kind is unknown, or a key belongs to neither the stage nor the scorer.
    """
    config, plugin = section.parse_with_plugin(Config, PLUGINS)
    return ScoreSection(**vars(config), scorer=plugin)


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each `[score.NAME]` and caption pass.

    Raises:
        ConfigError: a section names something that does not exist.
    """
    for name, config in run.sections["score"].items():
        if config.min_detection is not None and not run.sections["canary"]:
            raise ConfigError(f"{run.file}: score.{name}.min_detection", "needs [canary], which measures it")
    for p in list_score_passes(run):
        made = p.build_pass(
            run,
            stage="score",
            version=VERSION,
            slice=p.slice(run),
            record=Score,
            inputs=partial(read_samples, p=p, seed=run.seed),
            work=partial(work, name=p.name, caption=p.caption, scorer=p.scorer),
        )
        yield from share_rows(made) if p.is_shared else (made,)


def work(
    samples: Iterator[Sample], engines: Mapping[str, Engine], *, name: str, caption: str, scorer: Scorer
) -> Iterator[Score]:
    pairs = ((sample, sample) for sample in samples)
    for sample, result in map_with_context(partial(scorer.score, engines=engines), pairs):
        yield Score(key=sample.key, caption=caption, candidate=sample.candidate, name=name, **vars(result))
