"""Canary stage: scorers rate spoiled copies of a few captions, to show what they notice.

A good judge gives the copy less than the original. The copies are never exported. Does not know how a copy is spoiled,
nor how a scorer rates it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Canary
from pipeline.sections import Run, key
from stages.audit.canaries import check_detection
from stages.audit.spoilers import KINDS, SpoiledText, hash_words, spoil_text
from stages.scorers import Sample, Scorer
from stages.scorers._samples import ScorePass, list_score_passes, read_samples
from stages.text.prompts import map_with_context

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    share: float = key(0.02, "the share of captions of which spoiled copies are scored too", least=0, most=1)
    scores: tuple[str, ...] | None = key(None, "the scores to test; default: those that ask a model", stamp=False)


@dataclass(frozen=True, kw_only=True)
class SpoiledSample:
    """A spoiled copy of a caption to score."""

    sample: Sample
    spoiled: SpoiledText

    @property
    def id(self) -> tuple[str | int, ...]:
        return (*self.sample.id, self.spoiled.kind)


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each score that is tested and caption pass.

    Raises:
        ConfigError: a section names something that does not exist.
    """
    for config in run.sections["canary"].values():
        known = run.sections["score"]
        demanding = {name for name, section in known.items() if section.min_detection is not None}
        if config.scores is not None and (untested := sorted(demanding.difference(config.scores))):
            raise ConfigError(f"{run.file}: canary.scores", f"lacks {untested[0]!r}, which has min_detection")
        for name in config.scores or ():
            if name not in known:
                raise ConfigError(f"{run.file}: canary.scores", plugins.explain_unknown(name, sorted(known)))
        for p in list_score_passes(run):
            if p.name in config.scores if config.scores is not None else p.scorer.engines:
                if wrong := sorted({*p.scorer.unasked} - KINDS.keys()):
                    unknown = plugins.explain_unknown(wrong[0], sorted(KINDS))
                    raise ConfigError(f"{run.file}: score.{p.name}", f"unasked in its rubric: {unknown}")
                yield p.build_pass(
                    run,
                    stage="canary",
                    version=VERSION,
                    slice={"share": config.share, "seed": run.seed, "words": hash_words(), "scorer": p.slice(run)},
                    record=Canary,
                    inputs=partial(inputs, p=p, share=config.share, seed=run.seed),
                    work=partial(work, name=p.name, caption=p.caption, scorer=p.scorer),
                    finish=partial(finish, p=p),
                )


def finish(run: Run, _: bool, *, p: ScorePass) -> None:
    """
    Raises:
        JudgeError: the judge notices less than its section demands.
    """
    minimum: float | None = run.sections["score"][p.name].min_detection
    if minimum is not None:
        check_detection(run, p, minimum=minimum)


def inputs(shard: Shard, *, p: ScorePass, share: float, seed: int) -> Iterator[SpoiledSample]:
    """The spoiled copies of a seeded share of captions. What they take from another caption is from the one before."""
    previous: Sample | None = None
    other: str | None = None  # the latest caption of another image
    for sample in read_samples(shard, p, seed=seed):
        if previous is not None and previous.key != sample.key:
            other = previous.text
        previous = sample
        identity = f"{seed}/{p.caption}/{sample.key}/{sample.candidate}"
        if int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) < share * 2**64:
            for spoiled in spoil_text(sample.text, seed=identity, other=other):
                yield SpoiledSample(sample=replace(sample, text=spoiled.text), spoiled=spoiled)


def work(
    inputs: Iterator[SpoiledSample], engines: Mapping[str, Engine], *, name: str, caption: str, scorer: Scorer
) -> Iterator[Canary]:
    pairs = ((row, row.sample) for row in inputs)
    for row, result in map_with_context(partial(scorer.score, engines=engines), pairs):
        yield Canary(
            key=row.sample.key,
            caption=caption,
            candidate=row.sample.candidate,
            name=name,
            **vars(row.spoiled),
            **vars(result),
        )
