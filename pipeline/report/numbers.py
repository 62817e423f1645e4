"""Decides what a report of a run says in numbers: each is one aggregate in DuckDB, whatever the run's size.

It works on a run in any state: what is not made yet is empty. It does not know how a number is shown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from itertools import groupby
from typing import Any

from pipeline.sections import Plugin, Run, stamped
from pipeline.storage import database, plan, views

NUM_BINS = 20  # of a score's distribution
MAX_WORDS = 2_000  # longer texts count as this long
MAX_ROWS = 40  # of a table whose length the data decides
MAX_ANSWERS = 400
NUM_POINTS = 300  # of a curve
USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")  # names and passwords in URLs


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many rows are of a kind."""

    of: str = ""  # the pass, where there are several
    label: str
    count: int
    example: str | None = None  # one row's error


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long texts are."""

    name: str  # the caption pass; "" for the alt text
    counts: tuple[tuple[int, int], ...]  # (words, texts), by words; at most MAX_WORDS

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts)

    def quantile(self, share: float) -> int:
        """The least number of words that `share` of the texts do not exceed."""
        seen = 0
        for words, count in self.counts:
            seen += count
            if seen >= share * self.total:
                return words
        return 0


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What one score pass says of one caption pass."""

    score: str
    caption: str
    bins: tuple[int, ...]  # captions in each of NUM_BINS equal parts of [0, 1]
    mean: float | None
    num_unknown: int  # captions of which it could not say anything


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How often a criterion was answered so."""

    verdict: str | None  # None: the judge could not say
    count: int
    value: float | None  # [0, 1]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was answered to one criterion, the best answer first."""

    score: str
    caption: str
    criterion: str
    answers: tuple[Answer, ...]

    @property
    def mean(self) -> float | None:
        known = [(a.value, a.count) for a in self.answers if a.value is not None]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if total else None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass has cost so far."""

    title: str  # as people write it: score:judge:dense
    num_shards: int
    num_rows: int
    rows_per_second: float | None  # of one worker
    seconds: float  # of all workers together
    num_errors: int
    num_retries: int
    num_prompt_tokens: int
    num_output_tokens: int
    waiting: float | None  # [0, 1]: share of the time that the engine waited for input


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure of a training, step by step."""

    name: str
    points: tuple[tuple[float, float], ...]  # (step, value), by step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A section of run.toml in brief: what was given in it and decides rows."""

    section: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All numbers of a report."""

    name: str
    until: float | None  # when the last shard was made; seconds since 1970, UTC
    num_shards: int  # planned
    num_planned: int | None  # inputs, where the plan can know
    funnel: Mapping[str, int]  # in, usable, captioned, kept, exported: images
    images: tuple[Tally, ...]  # by status
    captions: tuple[Tally, ...]  # by status
    attempts: tuple[Tally, ...]  # captions by the attempt at which they came
    flags: tuple[Tally, ...]
    refusals: tuple[Tally, ...]  # captions by the reason why they were refused
    lengths: tuple[Lengths, ...]  # the alt text's first
    scores: tuple[Distribution, ...]
    answers: tuple[Answers, ...]
    costs: tuple[Cost, ...]
    curves: tuple[Curve, ...]
    settings: tuple[Setting, ...]


def read_numbers(run: Run) -> Report:
    """Asks the run's tables for all numbers."""
    with views.connect(run) as connection:
        costs, until = _costs(connection)
        return Report(
            name=run.folder.name,
            until=until,
            num_shards=plan.count(path) if (path := run.folder / "plan.parquet").exists() else 0,
            num_planned=_one(connection, "SELECT sum(stop - start) FROM plan HAVING bool_and(stop IS NOT NULL)"),
            funnel={name: _one(connection, sql) or 0 for name, sql in FUNNEL.items()},
            images=_tallies(connection, IMAGES),
            captions=_tallies(connection, CAPTIONS),
            attempts=_tallies(connection, ATTEMPTS),
            flags=_tallies(connection, FLAGS),
            refusals=_tallies(connection, REFUSALS),
            lengths=tuple(_lengths(connection)),
            scores=tuple(_distributions(connection)),
            answers=tuple(_answers(connection)),
            costs=costs,
            curves=tuple(_curves(connection)),
            settings=tuple(_settings(run)),
        )


# An image is captioned once, however many captions it has. A set bit for each image is exact and takes 1/64 of the
# groups that count(DISTINCT key) would: keys are consecutive numbers. Chosen is at most one verdict of an image.
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
# The error that is shown follows from the keys, so that the same run gives the same report.
IMAGES = """
    SELECT '', status, count(*) AS num, min_by(error, md5_number_lower(key)) FROM image
    GROUP BY status ORDER BY num DESC, status"""
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
    SELECT name, least(len(regexp_extract_all(text, '\\S+')), {MAX_WORDS}) AS words, count(*)
    FROM texts GROUP BY name, words ORDER BY name, words"""
SCORES = f"""
    SELECT name, caption, least(floor(value * {NUM_BINS})::INTEGER, {NUM_BINS - 1}) AS bin, count(*), sum(value)
    FROM score GROUP BY name, caption, bin ORDER BY name, caption, bin"""
# A judge that is asked sentence by sentence numbers its criteria: nothing_invented/1, nothing_invented/2, ...
ANSWERS = """
    WITH asked AS (
        SELECT name, caption, unnest(criteria) AS said, generate_subscripts(criteria, 1) AS place FROM score
    ), each AS (
        SELECT name, caption, said.id AS id, said.verdict AS verdict, count(*) AS num, count(said.value) AS valued,
            sum(said.value) AS total, min(place) AS place
        FROM asked GROUP BY ALL
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
        sum(num_new_rows) / nullif(sum(seconds) FILTER (num_new_rows > 0), 0), sum(seconds), sum(num_errors)::BIGINT,
        sum(num_retries)::BIGINT, sum(num_prompt_tokens)::BIGINT, sum(num_output_tokens)::BIGINT, avg(waiting),
        max(started_at + seconds)
    FROM stats GROUP BY stage, name, caption ORDER BY min(started_at), stage, name, caption"""


def _one(connection: database.Connection, sql: str) -> int | None:
    """The only value of a statement; None when it gives no row."""
    row = next(database.rows(connection, sql), None)
    return None if row is None or row[0] is None else int(row[0])


def _tallies(connection: database.Connection, sql: str) -> tuple[Tally, ...]:
    rows = database.rows(connection, f"{sql} LIMIT {MAX_ROWS}")
    return tuple(Tally(of=of, label=label, count=num, example=example) for of, label, num, example in rows)


def _lengths(connection: database.Connection) -> Iterator[Lengths]:
    for name, rows in groupby(database.rows(connection, LENGTHS), key=lambda row: row[0]):
        yield Lengths(name=name, counts=tuple((words, count) for _, words, count in rows))


def _distributions(connection: database.Connection) -> Iterator[Distribution]:
    for (score, caption), rows in groupby(database.rows(connection, SCORES), key=lambda row: row[:2]):
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


def _answers(connection: database.Connection) -> Iterator[Answers]:
    rows = database.rows(connection, f"{ANSWERS} LIMIT {MAX_ANSWERS}")
    for (score, caption, criterion), group in groupby(rows, key=lambda row: row[:3]):
        answers = tuple(Answer(verdict=verdict, count=num, value=mean) for *_, verdict, num, mean, _ in group)
        yield Answers(score=score, caption=caption, criterion=criterion, answers=answers)


def _costs(connection: database.Connection) -> tuple[tuple[Cost, ...], float | None]:
    names = [field.name for field in dataclasses.fields(Cost)]
    rows = list(database.rows(connection, COSTS))
    costs = tuple(Cost(**dict(zip(names, row[:-1], strict=True))) for row in rows)
    return costs, max((row[-1] for row in rows), default=None)


def _curves(connection: database.Connection) -> Iterator[Curve]:
    for name, points in groupby(database.rows(connection, POINTS), key=lambda row: row[0]):
        yield Curve(name=name, points=tuple((step, value) for _, step, value in points))


# Steps that fall on one point of the picture are averaged. How fast a training was is no part of what it learnt.
POINTS = f"""
    SELECT name, avg(step) AS place, avg(value) FROM step
    WHERE isfinite(value) AND NOT regexp_matches(name, '(runtime|_per_second|total_flos)$')
    GROUP BY name, step * {NUM_POINTS} // (SELECT greatest(max(step), 1) FROM step) ORDER BY name, place"""


def _settings(run: Run) -> Iterator[Setting]:
    yield _setting("source", run.source.kind, run.source.config)
    for name, engine in run.engines.items():
        yield _setting(f"engines.{name}", engine.kind, engine.config)
    for stage, named in run.sections.items():
        for name, section in named.items():
            setting = _setting(".".join(filter(None, (stage, name))), None, section)
            if setting.values:
                yield setting


def _setting(section: str, kind: str | None, values: Any) -> Setting:
    given = [] if kind is None else [("kind", kind)]
    return Setting(section=section, values=(*given, *_given(values)))


def _given(values: Any) -> Iterator[tuple[str, str]]:
    """What differs from the defaults; where a run is served or how long it may take decides no row and is left out."""
    decisive = stamped(values)
    for field in dataclasses.fields(values):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(values, field.name)
        if field.name not in decisive or value == default or value is None:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{field.name}.{name}", _word(one)) for name, one in value.items())
        elif isinstance(value, Plugin):
            yield from (("kind", value.kind), *_given(value.config))
        else:
            yield field.name, _word(decisive[field.name])


def _word(value: Any) -> str:
    return USER_INFO.sub("", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
