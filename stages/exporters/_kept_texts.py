"""The texts that images may be exported with: kept captions and alt texts, with their scores, from a run's tables.

Which of them is exported is decided in stages/text/selection.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.execution.passes import AllShards, Shard
from pipeline.records import NamedScore
from pipeline.sections import Run
from pipeline.storage import database
from stages.text.conditions import (
    IMAGE_COLUMNS,
    ORDER_BY,
    build_rows,
    check_query,
    find_finders,
    find_scores,
    join_finders,
    list_competing,
    list_finder_columns,
    list_finder_folders,
    merge_finders,
)
from stages.text.selection import RAW, ExportText, TextConfig

# Every text that an image may be exported with; alt text has no candidate. No column of users has a blank in its name.
TEXTS = """
    WITH texts AS ({rows} {alt_texts}), kept AS (
        SELECT t.*, v.chosen AS "is chosen" FROM texts AS t
        LEFT JOIN verdict AS v ON v.key = t.key AND v.caption = t.caption AND v.candidate = t.candidate
        WHERE t.candidate IS NULL OR v.{condition}
    )
    SELECT key, caption, candidate, text, coalesce(fields, '{{}}'), model, revision, coalesce("is chosen", false),
        row_number() OVER (PARTITION BY key, caption ORDER BY {order}, candidate) AS rank,
        ({raw_score})::DOUBLE, ({weight})::DOUBLE{scores}
    FROM kept ORDER BY key, caption, rank"""
ALT_TEXTS = f"""
    UNION ALL BY NAME SELECT i.key, {", ".join(f"i.{name}" for name in IMAGE_COLUMNS)}, '{RAW}' AS caption,
        alt_text AS text, count_words(alt_text) AS num_words{{columns}}
    FROM image AS i {{joins}} WHERE i.status = 'ok' AND trim(alt_text) <> ''"""
# The lowest score of the top share of raw texts, by rank, so that no outlier moves it; DuckDB sorts on disk if it must.
THRESHOLD = """
    WITH texts AS ({rows} {alt_texts}), scored AS (
        SELECT ({raw_score})::DOUBLE AS score FROM texts WHERE caption = {raw} AND (status = 'ok' OR candidate IS NULL)
    ), finite AS (FROM scored WHERE isfinite(score)),
    rank AS (SELECT greatest(0, ceil({share} * count(*)) - 1)::BIGINT AS last FROM finite)
    SELECT (SELECT score FROM finite ORDER BY score DESC LIMIT 1 OFFSET (SELECT last FROM rank))"""
THRESHOLD_FILE = "raw_score.json"


@dataclass(frozen=True, kw_only=True)
class KeptText(ExportText):
    """A kept caption of an image, or its alt text, with what is exported beside it."""

    candidate: int
    fields: str  # JSON
    model: str
    revision: str
    weight: float | None
    scores: tuple[NamedScore, ...]


def build_query(run: Run, settings: TextConfig, scores: Sequence[str]) -> tuple[str, list[str]]:
    """The query for the texts of a shard's images, and the scores that it uses, which are its last columns.

    They are the given ones, and what `[filter] choose` and SQL of `[export]` use where they decide texts or weights.

    Raises:
        ConfigError: a key of `[export]` names no pass, or its SQL is not valid.
    """
    captions = list_competing(run)
    named = settings.named_passes | ({RAW} if settings.uses_raw else set())
    if left_out := sorted(named & (run.sections["caption"].keys() - {*captions})):
        message = f"uses captions of {left_out[0]!r}, which [filter] captions leaves out; add it there"
        raise ConfigError(f"{run.file}: export", message)
    if unknown := sorted(settings.named_passes - {*captions, RAW}):
        known = ", ".join(sorted({*captions, RAW}))
        raise ConfigError(f"{run.file}: export", f"texts or prefix names {unknown[0]!r}; it may name {known}")
    choose = run.sections["filter"][""].choose if settings.texts else "candidate"
    used = {*scores, *find_scores(run, "filter.choose", choose, clause=ORDER_BY)}
    for name in ("weight", "raw_score"):
        if sql := getattr(settings, name):
            used |= find_scores(run, f"export.{name}", sql)
    query = TEXTS.format(
        **_build_texts(run, settings, sorted(used), finders=find_text_finders(run, settings)),
        condition="keep" if settings.texts else "chosen",
        order=choose,
        weight=settings.weight or "1.0",
        scores="".join(f", {database.quote_identifier(score)}" for score in sorted(used)),
    )
    if settings.weight or settings.raw_score:
        check_query(run, "export", query)
    return query, sorted(used)


def find_text_finders(run: Run, settings: TextConfig) -> dict[str, frozenset[str]]:
    """The finders, with their fields, that the SQL uses which decides texts and weights."""
    choose = run.sections["filter"][""].choose if settings.texts else "candidate"
    own = filter(None, (settings.weight, settings.raw_score))
    return merge_finders(find_finders(run, choose, clause=ORDER_BY), find_finders(run, *own))


def _build_texts(
    run: Run,
    settings: TextConfig,
    scores: Sequence[str],
    captions: Sequence[str] = (),
    *,
    finders: Mapping[str, frozenset[str]],
) -> dict[str, str]:
    """The parts of TEXTS and THRESHOLD that they share."""
    has_alt_texts = settings.uses_raw and RAW not in run.sections["caption"]
    return {
        "rows": build_rows(scores, captions or list_competing(run), finders),
        "alt_texts": ALT_TEXTS.format(columns=list_finder_columns(finders), joins=join_finders(finders))
        if has_alt_texts
        else "",
        "raw_score": settings.raw_score or "NULL",
    }


def list_raw_folders(run: Run, settings: TextConfig) -> Iterator[str]:
    """The folders of the tables, of all shards, from which the top share of raw texts is found."""
    if settings.raw_top:
        yield "image"
        yield from list_finder_folders(find_finders(run, settings.raw_score))
        if RAW in run.sections["caption"]:
            yield f"caption/{RAW}"
            yield from (f"score/{name}/{RAW}" for name in sorted(find_scores(run, "export", settings.raw_score)))


def write_threshold(shards: AllShards, folder: Path, *, settings: TextConfig) -> None:
    """Finds the score from which on raw texts are among the top share of all shards."""
    run = shards.run
    scores = sorted(find_scores(run, "export.raw_score", settings.raw_score))
    query = THRESHOLD.format(
        **_build_texts(run, settings, scores, [RAW], finders=find_finders(run, settings.raw_score)),
        raw=database.quote_literal(RAW),
        share=settings.raw_top,
    )
    with database.connect_run(run) as connection:
        ((threshold,),) = database.query_rows(connection, query)
    (folder / THRESHOLD_FILE).write_text(json.dumps(threshold))


def read_texts(
    shard: Shard, query: str, scores: Sequence[str], *, has_threshold: bool
) -> Iterator[tuple[str, list[KeptText]]]:
    """The key of each image of a shard that has texts, in order, with its texts.

    Args:
        shard: whose tables are read.
        query: of `build_query`.
        scores: the names of its last columns.
        has_threshold: whether `write_threshold` was the pass's `prepare`.
    """
    threshold = None
    if has_threshold and shard.ensure_shared:
        threshold = json.loads((shard.ensure_shared() / THRESHOLD_FILE).read_text())
    for key, rows in groupby(shard.query(query), key=itemgetter(0)):
        yield key, [_read_text(row, scores, threshold) for row in rows]


def _read_text(row: tuple[Any, ...], scores: Sequence[str], threshold: float | None) -> KeptText:
    """A row of TEXTS."""
    _, caption_pass, candidate, text, fields, model, revision, chosen, rank, raw_score, weight, *values = row
    is_scored = threshold is not None and raw_score is not None and caption_pass == RAW and rank == 1
    return KeptText(
        text=text,
        caption_pass=caption_pass,
        is_kept=candidate is not None,
        is_chosen=chosen,
        is_best=rank == 1,
        is_top=is_scored and raw_score >= threshold,
        candidate=candidate or 0,
        fields=fields,
        model=model or "",
        revision=revision or "",
        weight=weight,
        scores=tuple(
            NamedScore(name=name, value=value) for name, value in zip(scores, values, strict=True) if value is not None
        ),
    )
