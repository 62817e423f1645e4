"""The samples of a report: random ones, by a hash of their keys, the worst kept and the best refused.

The same run shows the same samples. Selection reads only keys and scores; then only the shards of the selected keys are
opened. Layout belongs to the template.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.errors import UndecodableError
from pipeline.execution.passes import Shard
from pipeline.records import Caption, Criterion, Image, Record, Score, Verdict, column_names
from pipeline.sections import Run
from pipeline.storage import database
from pipeline.storage.plan import Plan

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EDGES = (640, 448, 320, 256)  # pixels of a picture's longer edge, the largest that fits
MAX_BYTES = 3_200_000  # of all pictures, unless they are larger at the smallest edge; the page has a third more
MAX_CAPTIONS = 4  # shown per image
MAX_SHARDS = 256  # that are searched for the worst and the best, so that memory does not grow with the run
SHARES = {"kept": 0.3, "worst": 0.2, "best": 0.2, "refused": 0.2, "unusable": 0.1}  # of the samples


@dataclass(frozen=True, kw_only=True)
class JudgedCaption:
    """A caption with its verdict and scores."""

    caption: Caption
    verdict: Verdict | None
    scores: tuple[Score, ...]

    @property
    def outcome(self) -> str:
        """The verdict in words, or the reason for refusal; "" before filtering."""
        if self.verdict is None or not self.verdict.keep:
            return (self.verdict.reason if self.verdict else None) or ""
        return "kept" if self.verdict.chosen else "kept, not chosen"

    @property
    def values(self) -> Mapping[str, float]:
        """The scores that have a value, by the name of the score pass."""
        return {score.name: score.value for score in self.scores if score.value is not None}


@dataclass(frozen=True, kw_only=True)
class ReportSample:
    """An image with its captions, the chosen one first."""

    image: Image
    picture: bytes | None  # a JPEG; None if the image cannot be shown, for the reason in `error`
    error: str | None
    captions: tuple[JudgedCaption, ...]
    num_captions: int  # including those not shown


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Samples of one kind."""

    kind: str  # kept, worst, best, refused, captioned, usable, unusable
    samples: tuple[ReportSample, ...]

    @property
    def has_scores(self) -> bool:
        return any(judged.scores for sample in self.samples for judged in sample.captions)


def draw_sheets(run: Run, *, num_images: int) -> Iterator[Sheet]:
    """Sheets with at most `num_images` samples in all; for an unfinished run, samples of its last stage."""
    with database.connect_run(run) as connection:
        keys_by_kind = dict(_select_keys(connection, num_images))
    selected = set(chain.from_iterable(keys_by_kind.values()))
    by_key = _read_samples(run, selected, max_bytes=MAX_BYTES // max(1, len(selected)))
    for kind, keys in keys_by_kind.items():
        if samples := tuple(by_key[key] for key in keys if key in by_key):
            yield Sheet(kind=kind, samples=samples)


def _select_keys(connection: database.Connection, num_images: int) -> Iterator[tuple[str, list[str]]]:
    """Kind -> keys."""
    sizes = {kind: max(1, round(share * num_images)) for kind, share in SHARES.items()}
    if _has_rows(connection, "verdict"):
        ranked = {kind: _take_in_turn(connection, sql, sizes[kind]) for kind, sql in (("worst", WORST), ("best", BEST))}
        shown = {key for keys in ranked.values() for key in keys}
        yield "kept", _take_in_turn(connection, KEPT, sizes["kept"], without=shown)
        yield from ranked.items()
        yield "refused", _take_in_turn(connection, REFUSED, sizes["refused"], without=shown)
    elif _has_rows(connection, "caption"):
        yield "captioned", _take_in_turn(connection, CAPTIONED, sizes["kept"])
    else:
        yield "usable", _take_in_turn(connection, USABLE, sizes["kept"])
    yield "unusable", _take_in_turn(connection, UNUSABLE, sizes["unusable"])


# Each query returns (group, keys ordered by a hash); min_by keeps no more keys than it returns. Every image has a
# candidate 0 in every pass, so looking at those gives each image the same chance, whatever the number of candidates.
# REFUSED selects more keys than it needs, because another candidate of an image may be kept.
ORDERED = "min_by(key, md5_number_lower(key), {size})"
KEPT = f"SELECT '', {ORDERED} FROM verdict WHERE chosen"
REFUSED = f"""
    WITH groups AS (
        SELECT reason, {ORDERED.replace("{size}", "{size} * 8")} AS keys FROM verdict
        WHERE NOT keep AND candidate = 0 GROUP BY reason
    ), selected AS (
        SELECT DISTINCT reason, unnest(keys) AS key FROM groups
    ), never_kept AS (
        SELECT key FROM verdict WHERE key IN (SELECT key FROM selected) GROUP BY key HAVING NOT bool_or(keep)
    )
    SELECT reason, list(key ORDER BY md5_number_lower(key)) FROM selected SEMI JOIN never_kept USING (key)
    GROUP BY reason ORDER BY count(*) DESC, reason"""
# The mean of a caption's scores ranks it. Equal scores are ordered by key, so that the same run shows the same samples.
RATED = f"""
    WITH shards AS (
        SELECT shard FROM (SELECT DISTINCT key[:6] AS shard FROM verdict)
        ORDER BY md5_number_lower(shard) LIMIT {MAX_SHARDS}
    ), judged AS (
        SELECT * FROM verdict SEMI JOIN shards ON key[:6] = shard
    ), rated AS (
        SELECT key, caption, candidate, avg(value) AS value FROM score SEMI JOIN shards ON key[:6] = shard
        GROUP BY key, caption, candidate HAVING avg(value) IS NOT NULL
    )"""
WORST = f"""{RATED}
    SELECT '', min_by(key, (value, key), {{size}})
    FROM judged JOIN rated USING (key, caption, candidate) WHERE chosen"""
BEST = f"""{RATED}
    SELECT reason, max_by(key, (value, key), {{size}}) FROM judged JOIN rated USING (key, caption, candidate)
    ANTI JOIN (SELECT key FROM judged WHERE keep) USING (key)
    GROUP BY reason ORDER BY count(*) DESC, reason"""
CAPTIONED = f"SELECT name, {ORDERED} FROM caption WHERE candidate = 0 GROUP BY name ORDER BY name"
USABLE = f"SELECT '', {ORDERED} FROM image WHERE status = 'ok'"
UNUSABLE = f"""
    SELECT status, {ORDERED} FROM image WHERE status <> 'ok' GROUP BY status ORDER BY count(*) DESC, status"""


def _take_in_turn(connection: database.Connection, sql: str, size: int, *, without: Collection[str] = ()) -> list[str]:
    """Takes keys from each group in turn, so that rare reasons appear beside common ones."""
    groups = [keys or () for _, keys in database.query_rows(connection, sql.format(size=size + len(without)))]
    keys = (key for key in chain.from_iterable(zip_longest(*groups)) if key is not None and key not in without)
    return list(islice(dict.fromkeys(keys), size))


def _has_rows(connection: database.Connection, table: str) -> bool:
    return next(database.query_rows(connection, f"SELECT 1 FROM {table} LIMIT 1"), None) is not None


def _read_samples(run: Run, keys: Iterable[str], *, max_bytes: int) -> Mapping[str, ReportSample]:
    """The samples of these keys, read shard by shard; each picture has about `max_bytes` or fewer."""
    samples: dict[str, ReportSample] = {}
    for number, group in groupby(sorted(keys), lambda key: int(key[:6])):
        literals = ", ".join(map(database.quote_literal, group))
        plan = Plan.load(run.folder / "plan.parquet", str(number))[0]
        with (
            closing(Shard(run=run, number=number, pieces=plan.pieces(number))) as shard,
            database.connect_run(run, files=f"{number:05d}.parquet") as connection,
        ):
            captions = _read_captions(connection, literals)
            for row in _read_rows(connection, Image, literals, order='"offset"'):
                image = Image(**row)
                picture, error = _read_picture(shard, image, max_bytes)
                texts = captions.get(image.key, [])
                samples[image.key] = ReportSample(
                    image=image,
                    picture=picture,
                    error=error,
                    captions=tuple(texts[:MAX_CAPTIONS]),
                    num_captions=len(texts),
                )
    return samples


def _read_picture(shard: Shard, image: Image, max_bytes: int) -> tuple[bytes | None, str | None]:
    """A JPEG, or the reason why there is none, such as a tar that was removed since ingest."""
    if image.status != "ok":
        return None, image.error
    rule = images.PixelRule(max_pixels=EDGES[0] ** 2, min_pixels=1, factor=1)
    try:
        picture = images.decode_pixels(shard.read_image(image), rule)
    except (UndecodableError, OSError) as error:
        return None, str(error)
    return _encode_picture(picture, max_bytes), None


def _encode_picture(picture: Picture, max_bytes: int) -> bytes:
    """A JPEG at the largest of EDGES at which it has at most `max_bytes`, or at the smallest."""
    for edge in EDGES:
        file = io.BytesIO()
        picture.thumbnail((edge, edge))
        picture.save(file, "JPEG", quality=82, comment=b"")
        if file.tell() <= max_bytes:
            break
    return file.getvalue()


def _read_captions(connection: database.Connection, keys: str) -> dict[str, list[JudgedCaption]]:
    """Key -> its captions, the chosen one first, then those that are kept."""
    verdicts = {verdict.id: verdict for verdict in (Verdict(**r) for r in _read_rows(connection, Verdict, keys))}
    scores: dict[tuple[Any, ...], list[Score]] = {}
    for row in _read_rows(connection, Score, keys, order="name"):
        row["criteria"] = tuple(Criterion(**criterion) for criterion in row["criteria"])
        scores.setdefault((row["key"], row["caption"], row["candidate"]), []).append(Score(**row))
    captions: dict[str, list[JudgedCaption]] = {}
    for row in _read_rows(connection, Caption, keys, order="name, candidate"):
        caption = Caption(**row | {"flags": tuple(row["flags"])})
        identity = (caption.key, caption.name, caption.candidate)
        judged = JudgedCaption(caption=caption, verdict=verdicts.get(identity), scores=tuple(scores.get(identity, ())))
        captions.setdefault(caption.key, []).append(judged)
    return {key: sorted(group, key=_rank_caption) for key, group in captions.items()}


def _rank_caption(judged: JudgedCaption) -> tuple[bool, bool]:
    verdict = judged.verdict
    return not (verdict and verdict.chosen), not (verdict and verdict.keep)


def _read_rows(
    connection: database.Connection, record: type[Record], keys: str, *, order: str = "key"
) -> Iterator[dict[str, Any]]:
    """Rows of these keys, given as a list of SQL literals."""
    names = column_names(record)
    selected = ", ".join(map(database.quote_identifier, names))
    sql = f"SELECT {selected} FROM {record.table} WHERE key IN ({keys}) ORDER BY {order}"
    for row in database.query_rows(connection, sql):
        yield dict(zip(names, row, strict=True))
