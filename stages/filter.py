"""Filter stage: named SQL conditions over image and caption columns and scores decide which captions are kept.

The first condition that is false names the reason of a rejection. If a condition is NULL because a score is missing,
the caption is rejected as unscored:NAME.

With `balance`, conditions may use `quantile`, the place of a caption in its group of the whole run, so that what is
rare in the corpus is not rarer among the kept captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import AllShards, Pass, Shard
from pipeline.records import CaptionStatus, Record, Verdict
from pipeline.sections import Run, key
from pipeline.storage import database
from pipeline.storage.database import list_score_folders
from stages import recipes
from stages.text.conditions import (
    ORDER_BY,
    build_rows,
    check_flags,
    check_query,
    find_finders,
    find_rule_scores,
    find_scores,
    list_competing,
    list_finder_folders,
    merge_finders,
)

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
NUM_BINS = 4096  # of a group's captions, at most; the values of so few have quantiles of their own
MAX_GROUPS = 10_000
QUANTILES, QUANTILES_FILE = "quantiles", "quantiles.parquet"
# No column of users has a blank in its name.
GROUPED = """
    SELECT *, coalesce(({balance})::VARCHAR, '') AS "balance group",
        CASE WHEN status = 'ok' AND isfinite(({by})::DOUBLE) THEN ({by})::DOUBLE END AS "balance value"
    FROM wide"""
# For each bin's lowest value, the share of the group's captions in lower bins, and half of those in the same bin. Bins
# are by rank, so that no outlier puts all others into one.
FIND_QUANTILES = """
    WITH wide AS ({rows}), grouped AS ({grouped}),
    valued AS (SELECT "balance group" AS name, "balance value" AS value FROM grouped WHERE value IS NOT NULL),
    ranked AS (
        SELECT name, value, count(*) OVER (PARTITION BY name) AS num,
            rank() OVER (PARTITION BY name ORDER BY value) - 1 AS place
        FROM valued
    ),
    bins AS (
        SELECT name, num, min(value) AS value, count(*) AS size FROM ranked
        GROUP BY name, num, floor({num_bins} * place / num)
    )
    SELECT name, value, (sum(size) OVER (PARTITION BY name ORDER BY value) - size / 2) / num AS quantile
    FROM bins ORDER BY name, value"""
PLACED = """
    SELECT g.*, q.quantile FROM grouped AS g
    ASOF LEFT JOIN quantiles AS q ON q.name = g."balance group" AND g."balance value" >= q.value"""
NO_QUANTILES = "SELECT ''::VARCHAR AS name, 0.0::DOUBLE AS value, 0.0::DOUBLE AS quantile WHERE false"


@dataclass(frozen=True, kw_only=True)
class Config:
    rules: Mapping[str, str] = key(
        factory=dict, help='NAME = "SQL condition" that kept captions meet, checked in this order; a score is a column'
    )
    captions: tuple[str, ...] | None = key(
        None,
        "the caption passes that compete for export; others, such as drafts for another pass, have no verdicts and are"
        " not exported; default: all",
        stamp_default=False,
        in_init=False,
    )
    choose: str = key(
        "candidate", 'SQL order among the kept captions of an image, e.g. "judge DESC": the first is exported'
    )
    balance: str = key(
        "",
        'SQL for the group of a caption, e.g. "num_words // 20"; rules may then use quantile: the share of the group\'s'
        " captions in the whole run whose balance_by is lower, and half of those where it is equal",
        stamp_default=False,
    )
    balance_by: str = key("", 'SQL for what quantile is of, e.g. "judge"', stamp_default=False)

    def __post_init__(self) -> None:
        if bool(self.balance) != bool(self.balance_by):
            raise ValueError("balance and balance_by are both needed for quantile; one is missing")


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
    if not run.sections["caption"]:
        return
    captions = list_competing(run)
    if taken := sorted(set(settings.rules) & set(get_args(CaptionStatus))):
        raise ConfigError(f"{run.file}: filter.rules.{taken[0]}", "is the name of a caption status too; choose another")
    scores_by_rule = find_rule_scores(run)
    known = recipes.list_flags(run, captions)
    for rule, condition in settings.rules.items():
        check_flags(run, f"filter.rules.{rule}", condition, known)
    check_flags(run, "filter.choose", settings.choose, known, clause=ORDER_BY)
    scores = find_scores(run, "filter.choose", settings.choose, clause=ORDER_BY).union(*scores_by_rule.values())
    balanced = set[str]()  # scores
    for name in ("balance", "balance_by") if settings.balance else ():
        balanced |= find_scores(run, f"filter.{name}", getattr(settings, name))
    by_balance = find_finders(run, *filter(None, (settings.balance, settings.balance_by)))
    finders = merge_finders(
        find_finders(run, *settings.rules.values()), find_finders(run, settings.choose, clause=ORDER_BY), by_balance
    )
    missing = {
        rule: [*sorted(names), *find_finders(run, settings.rules[rule])] for rule, names in scores_by_rule.items()
    }
    rows = _build_judged_rows(settings, sorted(scores | balanced), captions, finders)
    sql = build_query(settings, missing, sorted(scores | balanced), captions, finders)
    check_query(run, "filter", _fill_quantiles(sql), rules=settings.rules, rows=_fill_quantiles(rows))
    texts = ("image", *(f"caption/{caption}" for caption in captions))
    yield Pass(
        stage="filter",
        folder="verdict",
        reads=(
            *texts[:1],
            *list_finder_folders(finders),
            *list_score_folders(run, scores | balanced, captions=captions),
            *texts[1:],
        ),
        reads_all=(*texts, *list_finder_folders(by_balance), *list_score_folders(run, balanced, captions=captions))
        if settings.balance
        else (),
        prepare=partial(
            write_quantiles, settings=settings, scores=sorted(balanced), captions=captions, finders=by_balance
        )
        if settings.balance
        else None,
        version=VERSION,
        slice=_build_slice(settings),
        record=Verdict,
        max_error_share=1.0,
        inputs=partial(inputs, sql=sql, has_quantiles=bool(settings.balance)),
        work=work,
    )


def _build_slice(settings: Config) -> dict[str, object]:
    values: dict[str, object] = {"rules": [[*rule] for rule in settings.rules.items()], "choose": settings.choose}
    if settings.captions is not None:
        values["captions"] = sorted(settings.captions)
    return values | ({"balance": settings.balance, "balance_by": settings.balance_by} if settings.balance else {})


def write_quantiles(
    shards: AllShards,
    folder: Path,
    *,
    settings: Config,
    scores: Sequence[str],
    captions: Sequence[str],
    finders: Mapping[str, frozenset[str]],
) -> None:
    """Writes, for each group of all shards' captions, the quantiles of its values: columns name, value, quantile.

    Raises:
        ConfigError: there are too many groups.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    query = FIND_QUANTILES.format(
        rows=build_rows(scores, captions, finders), grouped=_group_rows(settings), num_bins=NUM_BINS
    )
    with database.connect_run(shards.run) as connection:
        table = database.read_arrow(connection, query)
    if (num := len(pc.unique(table["name"]))) > MAX_GROUPS:
        message = f"{settings.balance!r} makes {num:,} groups, more than {MAX_GROUPS:,}; make them coarser"
        raise ConfigError(f"{shards.run.file}: filter.balance", message)
    pq.write_table(table, folder / QUANTILES_FILE)


def _group_rows(settings: Config) -> str:
    return GROUPED.format(balance=settings.balance, by=settings.balance_by)


def inputs(shard: Shard, *, sql: str, has_quantiles: bool) -> Iterator[FilterInput]:
    views: dict[str, pa.Table] = {}
    if has_quantiles and shard.ensure_shared:
        import pyarrow.parquet as pq

        views[QUANTILES] = pq.read_table(shard.ensure_shared() / QUANTILES_FILE)
    for image_key, caption, candidate, reason, rank in shard.query(sql, views=views):
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
    settings: Config,
    missing: Mapping[str, Sequence[str]],
    scores: list[str],
    captions: list[str],
    finders: Mapping[str, frozenset[str]],
) -> str:
    """A SELECT over a shard's views for key, caption, candidate, reason and rank of every caption row, in order.

    With `balance` it needs one more table, `quantiles`.

    Args:
        settings: the rules and the order.
        missing: the scores and finders of each rule; a rule that is NULL for want of one refuses as unscored:NAME.
        scores, finders: that become columns.
        captions: the caption passes.
    """
    return f"""
        WITH judged AS (
            SELECT *, {_build_reason(settings.rules, missing)} AS reason
            FROM ({_build_judged_rows(settings, scores, captions, finders)})
        )
        SELECT key, caption, candidate, reason,
            row_number() OVER (PARTITION BY key ORDER BY reason IS NOT NULL, {settings.choose}, caption, candidate)
        FROM judged ORDER BY key, caption, candidate"""


def _build_judged_rows(
    settings: Config, scores: list[str], captions: list[str], finders: Mapping[str, frozenset[str]]
) -> str:
    """A SELECT over a shard's views for the rows with the columns that rules may use."""
    rows = build_rows(scores, captions, finders)
    return f"WITH wide AS ({rows}), grouped AS ({_group_rows(settings)}) {PLACED}" if settings.balance else rows


def _fill_quantiles(sql: str) -> str:
    """The query with an empty table in place of the quantiles, for it to be planned."""
    return sql.replace(f"JOIN {QUANTILES} ", f"JOIN ({NO_QUANTILES}) ")


def _build_reason(rules: Mapping[str, str], missing: Mapping[str, Sequence[str]]) -> str:
    cases = ["WHEN status <> 'ok' THEN status"]
    for name, sql in rules.items():
        for score in missing[name]:
            lacks_score = f"({sql}) IS NULL AND {database.quote_identifier(score)} IS NULL"
            cases.append(f"WHEN {lacks_score} THEN {database.quote_literal(f'unscored:{score}')}")
        cases.append(f"WHEN ({sql}) IS NOT TRUE THEN {database.quote_literal(name)}")
    return f"CASE {' '.join(cases)} END"
