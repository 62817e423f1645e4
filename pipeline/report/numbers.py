"""The numbers of a report, each one aggregate in DuckDB, so that memory does not grow with the run.

A run may be in any state; numbers of unfinished stages are empty. Presentation belongs to the other modules.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from itertools import groupby
from typing import Any

from pipeline.sections import Plugin, Run, stamped
from pipeline.storage import database, plan

NUM_BINS = 20  # of a score's distribution
MAX_WORDS = 2_000  # longer texts count as this long
MAX_ROWS = 40  # of a table whose length the data decides
MAX_ANSWERS = 400
NUM_POINTS = 300  # of a curve
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")  # names and passwords in URLs


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """A number of rows of one kind."""

    group: str = ""  # the pass, where there are several
    label: str
    count: int
    example: str | None = None  # one row's error


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of texts in words."""

    name: str  # the caption pass; "" for the alt text
    counts: tuple[tuple[int, int], ...]  # (words, texts), by words; at most MAX_WORDS

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts)

    def quantile(self, share: float) -> int:
        """The smallest number of words that a `share` of the texts does not exceed."""
        seen = 0
        for words, count in self.counts:
            seen += count
            if seen >= share * self.total:
                return words
        return 0


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The scores that one score pass gave one caption pass."""

    score: str
    caption: str
    bins: tuple[int, ...]  # captions in each of NUM_BINS equal parts of [0, 1]
    mean: float | None
    num_unknown: int  # captions that could not be judged


@dataclass(frozen=True, kw_only=True)
class AnswerCount:
    """One answer to a criterion, and how often it was given."""

    verdict: str | None  # None: the judge could not say
    count: int
    value: float | None  # [0, 1]


@dataclass(frozen=True, kw_only=True)
class CriterionAnswers:
    """All answers to one criterion, the best first."""

    score: str
    caption: str
    criterion: str
    answers: tuple[AnswerCount, ...]

    @property
    def mean(self) -> float | None:
        known = [(a.value, a.count) for a in self.answers if a.value is not None]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if total else None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a pass so far."""

    title: str  # as in `recap run`: score:judge:dense
    num_shards: int
    num_rows: int
    rows_per_second: float | None  # of one worker
    seconds: float  # of all workers together
    num_errors: int
    num_retries: int
    num_prompt_tokens: int
    num_output_tokens: int
    waiting: float | None  # [0, 1]: share of the time in which the engine waited for input


@dataclass(frozen=True, kw_only=True)
class MetricCurve:
    """A metric of training by step."""

    name: str
    points: tuple[tuple[float, float], ...]  # (step, value), by step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The keys of a section of run.toml that are set and decide rows."""

    section: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ReportNumbers:
    """All numbers of a report."""

    name: str
    finished_at: float | None  # of the last shard; seconds since 1970, UTC
    num_shards: int  # planned
    num_planned: int | None  # inputs; None where only reading the tars would tell
    funnel: Mapping[str, int]  # in, usable, captioned, kept, exported: images
    images: tuple[RowCount, ...]  # by status
    curation: tuple[RowCount, ...]  # images by the reason why they are dropped; () for runs without [curate]
    captions: tuple[RowCount, ...]  # by status
    attempts: tuple[RowCount, ...]  # captions by the attempt that succeeded
    flags: tuple[RowCount, ...]
    refusals: tuple[RowCount, ...]  # captions by the reason for refusal
    lengths: tuple[Lengths, ...]  # the alt text first
    scores: tuple[Distribution, ...]
    answers: tuple[CriterionAnswers, ...]
    costs: tuple[Cost, ...]
    curves: tuple[MetricCurve, ...]
    settings: tuple[Setting, ...]

    @property
    def alt_text(self) -> Lengths | None:
        return next((lengths for lengths in self.lengths if not lengths.name), None)

    @property
    def num_captions(self) -> Mapping[str, int]:
        """By caption pass."""
        totals: dict[str, int] = {}
        for tally in self.captions:
            totals[tally.group] = totals.get(tally.group, 0) + tally.count
        return totals

    @property
    def has_retries(self) -> bool:
        return any(tally.label not in ("0", "1") for tally in self.attempts)


def read_numbers(run: Run) -> ReportNumbers:
    with database.connect_run(run) as connection:
        costs, finished_at = _read_costs(connection)
        return ReportNumbers(
            name=run.folder.name,
            finished_at=finished_at,
            num_shards=plan.count_shards(path) if (path := run.folder / "plan.parquet").exists() else 0,
            num_planned=_read_count(connection, "SELECT sum(stop - start) FROM plan HAVING bool_and(stop IS NOT NULL)"),
            funnel={name: _read_count(connection, sql) or 0 for name, sql in FUNNEL.items()},
            images=_read_tallies(connection, IMAGES),
            curation=_read_tallies(connection, CURATION),
            captions=_read_tallies(connection, CAPTIONS),
            attempts=_read_tallies(connection, ATTEMPTS),
            flags=_read_tallies(connection, FLAGS),
            refusals=_read_tallies(connection, REFUSALS),
            lengths=tuple(_read_lengths(connection)),
            scores=tuple(_read_distributions(connection)),
            answers=tuple(_read_answers(connection)),
            costs=costs,
            curves=tuple(_read_curves(connection)),
            settings=tuple(_list_settings(run)),
        )


# An image counts as captioned once, however many captions it has. One bit per image is exact and, because keys are
# consecutive numbers, needs 1/64 of the groups of count(DISTINCT key). At most one verdict of an image is chosen.
FUNNEL = {
    "in": "SELECT count(*) FROM image",
    "usable": "SELECT count(*) FROM image WHERE status = 'ok'",
    "captioned": """
        SELECT sum(bit_count(seen)) FROM (
            SELECT key::BIGINT // 64 AS block, bit_or(1::UBIGINT << (key::BIGINT % 64)::UBIGINT) AS seen
            FROM caption WHERE status = 'ok' GROUP BY block)""",
    "kept": "SELECT count(*) FROM verdict WHERE chosen",
    "exported": "SELECT count(*) FROM export",
}
# A hash of the keys selects the example, so that the same run gives the same report.
IMAGES = """
    SELECT '', status, count(*) AS num, min_by(error, md5_number_lower(key)) FROM image
    GROUP BY status ORDER BY num DESC, status"""
CURATION = """
    SELECT '', coalesce(reason, 'kept') AS label, count(*) AS num, NULL FROM curation
    GROUP BY label ORDER BY num DESC, label"""
CAPTIONS = """
    SELECT name, status, count(*) AS num, min_by(error, md5_number_lower(key)) FROM caption
    GROUP BY name, status ORDER BY name, num DESC, status"""
ATTEMPTS = """
    SELECT name, attempt::VARCHAR, count(*), NULL FROM caption GROUP BY name, attempt ORDER BY name, attempt"""
FLAGS = """
    SELECT name, flag, count(*) AS num, NULL FROM (SELECT name, unnest(flags) AS flag FROM caption)
    GROUP BY name, flag ORDER BY name, num DESC, flag"""
REFUSALS = """
    SELECT caption, reason, count(*) AS num, NULL FROM verdict WHERE NOT keep
    GROUP BY caption, reason ORDER BY caption, num DESC, reason"""
LENGTHS = f"""
    WITH texts AS (
        SELECT '' AS name, alt_text AS text FROM image WHERE status = 'ok' AND alt_text <> ''
        UNION ALL SELECT name, text FROM caption WHERE status = 'ok'
    )
    SELECT name, least(count_words(text), {MAX_WORDS}) AS words, count(*)
    FROM texts GROUP BY name, words ORDER BY name, words"""
SCORES = f"""
    SELECT name, caption,
        CASE WHEN value IS NOT NULL THEN least(floor(value * {NUM_BINS})::INTEGER, {NUM_BINS - 1}) END AS bin,
        count(*), sum(value)
    FROM score GROUP BY name, caption, bin ORDER BY name, caption, bin"""
# A judge of single sentences numbers its criteria: nothing_invented/1, nothing_invented/2, ...
ANSWERS = """
    WITH answer AS (
        SELECT name, caption, unnest(criteria) AS criterion, generate_subscripts(criteria, 1) AS place FROM score
    ), each AS (
        SELECT name, caption, criterion.id AS id, criterion.verdict AS verdict, count(*) AS num,
            count(criterion.value) AS valued, sum(criterion.value) AS total, min(place) AS place
        FROM answer GROUP BY ALL
    ), answered AS (
        SELECT name, caption, regexp_replace(id, '/[0-9]+$', '') AS criterion, verdict, sum(num)::BIGINT AS num,
            sum(total) / sum(valued) AS mean, min(place) AS place
        FROM each GROUP BY ALL
    )
    SELECT name, caption, criterion, verdict, num, mean,
        min(place) OVER (PARTITION BY name, caption, criterion) AS first
    FROM answered ORDER BY name, caption, first, criterion, mean DESC NULLS LAST, num DESC, verdict"""
COSTS = """
    SELECT concat_ws(':', stage, nullif(name, ''), nullif(caption, '')), count(*), sum(num_rows)::BIGINT,
        sum(num_rows) / nullif(sum(seconds), 0), sum(seconds), sum(num_errors)::BIGINT,
        sum(num_retries)::BIGINT, sum(num_prompt_tokens)::BIGINT, sum(num_output_tokens)::BIGINT, avg(waiting),
        max(started_at + seconds)
    FROM stats GROUP BY stage, name, caption ORDER BY min(started_at), stage, name, caption"""


def _read_count(connection: database.Connection, sql: str) -> int | None:
    """The value of a query with one column; None if it returns no row."""
    row = next(database.query_rows(connection, sql), None)
    return None if row is None or row[0] is None else int(row[0])


def _read_tallies(connection: database.Connection, sql: str) -> tuple[RowCount, ...]:
    rows = database.query_rows(connection, f"{sql} LIMIT {MAX_ROWS}")
    return tuple(RowCount(group=group, label=label, count=num, example=example) for group, label, num, example in rows)


def _read_lengths(connection: database.Connection) -> Iterator[Lengths]:
    for name, rows in groupby(database.query_rows(connection, LENGTHS), key=lambda row: row[0]):
        yield Lengths(name=name, counts=tuple((words, count) for _, words, count in rows))


def _read_distributions(connection: database.Connection) -> Iterator[Distribution]:
    for (score, caption), rows in groupby(database.query_rows(connection, SCORES), key=lambda row: row[:2]):
        counts, total = dict[int | None, int](), 0.0
        for _, _, place, count, sum_of_values in rows:
            counts[place] = count
            total += sum_of_values or 0.0
        num_unknown = counts.pop(None, 0)
        yield Distribution(
            score=score,
            caption=caption,
            bins=tuple(counts.get(place, 0) for place in range(NUM_BINS)),
            mean=total / sum(counts.values()) if counts else None,
            num_unknown=num_unknown,
        )


def _read_answers(connection: database.Connection) -> Iterator[CriterionAnswers]:
    rows = database.query_rows(connection, f"{ANSWERS} LIMIT {MAX_ANSWERS}")
    for (score, caption, criterion), group in groupby(rows, key=lambda row: row[:3]):
        answers = tuple(AnswerCount(verdict=verdict, count=num, value=mean) for *_, verdict, num, mean, _ in group)
        yield CriterionAnswers(score=score, caption=caption, criterion=criterion, answers=answers)


def _read_costs(connection: database.Connection) -> tuple[tuple[Cost, ...], float | None]:
    names = [field.name for field in dataclasses.fields(Cost)]
    rows = list(database.query_rows(connection, COSTS))
    costs = tuple(Cost(**dict(zip(names, row[:-1], strict=True))) for row in rows)
    return costs, max((row[-1] for row in rows), default=None)


def _read_curves(connection: database.Connection) -> Iterator[MetricCurve]:
    for name, points in groupby(database.query_rows(connection, POINTS), key=lambda row: row[0]):
        yield MetricCurve(name=name, points=tuple((step, value) for _, step, value in points))


# Steps that share a point of the chart are averaged. Metrics of speed are left out.
POINTS = f"""
    SELECT name, avg(step) AS place, avg(value) FROM step
    WHERE isfinite(value) AND NOT regexp_matches(name, '(runtime|_per_second|total_flos)$')
    GROUP BY name, step * {NUM_POINTS} // (SELECT greatest(max(step), 1) FROM step) ORDER BY name, place"""


def _list_settings(run: Run) -> Iterator[Setting]:
    yield _make_setting("source", run.source.kind, run.source.config)
    for name, engine in run.engines.items():
        yield _make_setting(f"engines.{name}", engine.kind, engine.config)
    for stage, named in run.sections.items():
        for name, section in named.items():
            setting = _make_setting(".".join(filter(None, (stage, name))), None, section)
            if setting.values:
                yield setting


def _make_setting(section: str, kind: str | None, config: Any) -> Setting:
    values = [] if kind is None else [("kind", kind)]
    return Setting(section=section, values=(*values, *_list_values(config)))


def _list_values(config: Any) -> Iterator[tuple[str, str]]:
    """The values that differ from the defaults and decide rows: no addresses, no time-outs."""
    decisive = stamped(config)
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in decisive or value == default or value is None:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{field.name}.{name}", _format_value(one)) for name, one in value.items())
        elif isinstance(value, Plugin):
            yield from (("kind", value.kind), *_list_values(value.config))
        else:
            yield field.name, _format_value(decisive[field.name])


def _format_value(value: Any) -> str:
    return USER_INFO.sub("", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
