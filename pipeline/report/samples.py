"""Decides which samples a person is shown, and how much of each: a few, drawn by a hash of their keys.

The same run shows the same samples. Drawing reads only keys; then only the shards of what was drawn are opened. It does
not know how a sample is laid out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from pipeline.decoding import images
from pipeline.errors import UndecodableError
from pipeline.execution.shard import Shard
from pipeline.records import Caption, Criterion, Image, Record, Score, Verdict, column_names
from pipeline.sections import Run
from pipeline.storage import database, views
from pipeline.storage.plan import Plan

THUMBNAIL = 256 * 256  # pixels
MAX_CAPTIONS = 4  # of an image that are shown
SHARES = {"kept": 0.5, "refused": 0.34, "unusable": 0.16}  # of the samples


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A caption with all that was said of it."""

    caption: Caption
    verdict: Verdict | None
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with its captions, the chosen one first."""

    image: Image
    thumbnail: bytes | None  # a small JPEG; None when there is no picture, `error` says why
    error: str | None
    captions: tuple[Shown, ...]
    num_captions: int  # all of them, shown or not


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Samples of a kind."""

    kind: str  # kept, refused, captioned, usable, unusable
    samples: tuple[Sample, ...]


def draw_sheets(run: Run, *, num_images: int) -> Iterator[Sheet]:
    """Sheets of `num_images` samples in all, or fewer; those of an unfinished run show what there is."""
    with views.connect(run) as connection:
        drawn = dict(_drawn(connection, num_images))
    found = _read(run, {key for keys in drawn.values() for key in keys})
    for kind, keys in drawn.items():
        if samples := tuple(found[key] for key in keys if key in found):
            yield Sheet(kind=kind, samples=samples)


def _drawn(connection: database.Connection, num_images: int) -> Iterator[tuple[str, list[str]]]:
    """Kind -> keys."""
    sizes = {kind: max(1, round(share * num_images)) for kind, share in SHARES.items()}
    if _any(connection, "verdict"):
        yield "kept", _take(connection, KEPT, sizes["kept"])
        yield "refused", _take(connection, REFUSED, sizes["refused"])
    elif _any(connection, "caption"):
        yield "captioned", _take(connection, CAPTIONED, sizes["kept"])
    else:
        yield "usable", _take(connection, USABLE, sizes["kept"])
    yield "unusable", _take(connection, UNUSABLE, sizes["unusable"])


# Each gives (group, keys of it in their order); a hash of the key orders, and min_by keeps no more than it gives. Every
# image has a candidate 0 in every pass, so looking at those draws each image alike, whatever the number of candidates.
# Of those whose first candidate is refused more are drawn, for another one may be kept.
ORDERED = "min_by(key, md5_number_lower(key), {size})"
KEPT = f"SELECT '', {ORDERED} FROM verdict WHERE chosen"
REFUSED = f"""
    WITH groups AS (
        SELECT reason, {ORDERED.replace("{size}", "{size} * 8")} AS keys FROM verdict
        WHERE NOT keep AND candidate = 0 GROUP BY reason
    ), drawn AS (
        SELECT DISTINCT reason, unnest(keys) AS key FROM groups
    ), lost AS (
        SELECT key FROM verdict WHERE key IN (SELECT key FROM drawn) GROUP BY key HAVING NOT bool_or(keep)
    )
    SELECT reason, list(key ORDER BY md5_number_lower(key)) FROM drawn SEMI JOIN lost USING (key)
    GROUP BY reason ORDER BY count(*) DESC, reason"""
CAPTIONED = f"SELECT name, {ORDERED} FROM caption WHERE candidate = 0 GROUP BY name ORDER BY name"
USABLE = f"SELECT '', {ORDERED} FROM image WHERE status = 'ok'"
UNUSABLE = f"""
    SELECT status, {ORDERED} FROM image WHERE status <> 'ok' GROUP BY status ORDER BY count(*) DESC, status"""


def _take(connection: database.Connection, sql: str, size: int) -> list[str]:
    """Keys of each group in turn, so that a rare reason is seen beside a common one."""
    groups = [keys or () for _, keys in database.rows(connection, sql.format(size=size))]
    keys = (key for key in chain.from_iterable(zip_longest(*groups)) if key is not None)
    return list(islice(dict.fromkeys(keys), size))


def _any(connection: database.Connection, table: str) -> bool:
    return next(database.rows(connection, f"SELECT 1 FROM {table} LIMIT 1"), None) is not None


def _read(run: Run, keys: Iterable[str]) -> Mapping[str, Sample]:
    """The samples of these keys, shard by shard."""
    found: dict[str, Sample] = {}
    for number, group in groupby(sorted(keys), lambda key: int(key[:6])):
        wanted = ", ".join(map(database.literal, group))
        with (
            closing(Shard(run=run, plan=_plan(run.folder, number), number=number)) as shard,
            views.connect(run, files=f"{number:05d}.parquet") as connection,
        ):
            captions = _captions(connection, wanted)
            for row in _rows(connection, Image, wanted, order='"offset"'):
                image = Image(**row)
                found[image.key] = _sample(shard, image, captions.get(image.key, []))
    return found


def _plan(run: Path, number: int) -> Plan:
    return Plan.load(run / "plan.parquet", str(number))[0]


def _sample(shard: Shard, image: Image, captions: list[Shown]) -> Sample:
    thumbnail, error = _thumbnail(shard, image)
    return Sample(
        image=image,
        thumbnail=thumbnail,
        error=error,
        captions=tuple(captions[:MAX_CAPTIONS]),
        num_captions=len(captions),
    )


def _thumbnail(shard: Shard, image: Image) -> tuple[bytes | None, str | None]:
    """A small picture, or why there is none. A tar that has gone since ingest is no reason to show nothing at all."""
    if image.status != "ok":
        return None, image.error
    try:
        picture = images.pixels(shard.data(image), max_pixels=THUMBNAIL, factor=1, min_pixels=1)
    except (UndecodableError, OSError) as error:
        return None, str(error)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82, comment=b"")
    return file.getvalue(), None


def _captions(connection: database.Connection, wanted: str) -> dict[str, list[Shown]]:
    verdicts = {verdict.id: verdict for verdict in (Verdict(**r) for r in _rows(connection, Verdict, wanted))}
    scores: dict[tuple[Any, ...], list[Score]] = {}
    for row in _rows(connection, Score, wanted, order="name"):
        row["criteria"] = tuple(Criterion(**criterion) for criterion in row["criteria"])
        scores.setdefault((row["key"], row["caption"], row["candidate"]), []).append(Score(**row))
    shown: dict[str, list[Shown]] = {}
    for row in _rows(connection, Caption, wanted, order="name, candidate"):
        caption = Caption(**row | {"flags": tuple(row["flags"])})
        place = (caption.key, caption.name, caption.candidate)
        one = Shown(caption=caption, verdict=verdicts.get(place), scores=tuple(scores.get(place, ())))
        shown.setdefault(caption.key, []).append(one)
    return {key: sorted(captions, key=_rank) for key, captions in shown.items()}


def _rank(shown: Shown) -> tuple[bool, bool]:
    verdict = shown.verdict
    return not (verdict and verdict.chosen), not (verdict and verdict.keep)


def _rows(
    connection: database.Connection, record: type[Record], wanted: str, *, order: str = "key"
) -> Iterator[dict[str, Any]]:
    names = column_names(record)
    chosen = ", ".join(map(database.identifier, names))
    sql = f"SELECT {chosen} FROM {record.table} WHERE key IN ({wanted}) ORDER BY {order}"
    for row in database.rows(connection, sql):
        yield dict(zip(names, row, strict=True))
