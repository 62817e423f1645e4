"""Filter stage: named SQL conditions over image and caption columns and scores decide which captions are kept.

The first condition that is false names the reason of a rejection. If a condition is NULL because a score is missing,
the caption is rejected as unscored:NAME.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args

from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import CaptionStatus, Record, Verdict
from pipeline.sections import Run, key
from pipeline.storage import database
from pipeline.storage.database import list_score_folders
from stages.text.conditions import ORDER_BY, build_rows, check_query, find_scores

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    rules: Mapping[str, str] = key(
        factory=dict, help='NAME = "SQL condition" that kept captions meet, checked in this order; a score is a column'
    )
    choose: str = key(
        "candidate", 'SQL order among the kept captions of an image, e.g. "judge DESC": the first is exported'
    )


@dataclass(frozen=True, kw_only=True)
class FilterInput:
    """A caption row with the verdict of the rules."""

    key: str
    caption: str
    candidate: int
    reason: str | None  # None: kept
    rank: int  # among the rows of its key, kept ones first

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.caption, self.candidate)


def passes(run: Run) -> Iterable[Pass]:
    settings: Config = run.sections["filter"][""]
    captions = list(run.sections["caption"])
    if not captions:
        return
    if taken := sorted(set(settings.rules) & set(get_args(CaptionStatus))):
        raise ConfigError(f"{run.file}: filter.rules.{taken[0]}", "is the name of a caption status too; choose another")
    scores_by_rule = {rule: find_scores(run, f"filter.rules.{rule}", sql) for rule, sql in settings.rules.items()}
    scores = find_scores(run, "filter.choose", settings.choose, clause=ORDER_BY).union(*scores_by_rule.values())
    sql = build_query(settings, scores_by_rule, sorted(scores), captions)
    check_query(run, "filter", sql)
    yield Pass(
        stage="filter",
        folder="verdict",
        reads=("image", *list_score_folders(run, scores), *(f"caption/{caption}" for caption in captions)),
        version=VERSION,
        slice={"rules": [[name, sql] for name, sql in settings.rules.items()], "choose": settings.choose},
        record=Verdict,
        max_error_share=1.0,
        inputs=partial(inputs, sql=sql),
        work=work,
    )


def inputs(shard: Shard, *, sql: str) -> Iterator[FilterInput]:
    for image_key, caption, candidate, reason, rank in shard.query(sql):
        yield FilterInput(key=image_key, caption=caption, candidate=candidate, reason=reason, rank=rank)


def work(inputs: Iterator[FilterInput], _: Mapping[str, Engine]) -> Iterator[Record]:
    for row in inputs:
        keep = row.reason is None
        yield Verdict(
            key=row.key,
            caption=row.caption,
            candidate=row.candidate,
            keep=keep,
            reason=row.reason,
            chosen=keep and row.rank == 1,
        )


def build_query(
    settings: Config, scores_by_rule: Mapping[str, set[str]], scores: list[str], captions: list[str]
) -> str:
    """A SELECT over a shard's views for key, caption, candidate, reason and rank of every caption row, in order."""
    return f"""
        WITH wide AS (
            {build_rows(scores, captions)}
        ), judged AS (
            SELECT *, {_build_reason(settings.rules, scores_by_rule)} AS reason FROM wide
        )
        SELECT key, caption, candidate, reason,
            row_number() OVER (PARTITION BY key ORDER BY reason IS NOT NULL, {settings.choose}, caption, candidate)
        FROM judged ORDER BY key, caption, candidate"""


def _build_reason(rules: Mapping[str, str], scores_by_rule: Mapping[str, set[str]]) -> str:
    cases = ["WHEN status <> 'ok' THEN status"]
    for name, sql in rules.items():
        for score in sorted(scores_by_rule[name]):
            missing = f"({sql}) IS NULL AND {database.quote_identifier(score)} IS NULL"
            cases.append(f"WHEN {missing} THEN {database.quote_literal(f'unscored:{score}')}")
        cases.append(f"WHEN ({sql}) IS NOT TRUE THEN {database.quote_literal(name)}")
    return f"CASE {' '.join(cases)} END"
