"""Curation stage: which images of the whole run are captioned, and which are copies of others.

Knows what a duplicate is and why an image is dropped; knows neither pixels nor how near hashes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline.decoding.excluded import describe_excluded, read_excluded
from pipeline.decoding.near_duplicates import MAX_DISTANCE, NUM_BITS, Pairs, choose_representatives, find_pairs
from pipeline.engines import Engine
from pipeline.errors import ConfigError, QueryError
from pipeline.execution.passes import AllShards, Pass, Shard
from pipeline.progress import format_count, format_quantity, say
from pipeline.records import Curation, ImageStatus, MeasuredImage, arrow_schema, column_names, make_key
from pipeline.sections import Run, key, stamped
from pipeline.storage import database
from stages.text.conditions import CONDITION

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    Array = npt.NDArray[Any]

VERSION = 1
KEPT, DUPLICATE = "", "duplicate"
REASONS = (KEPT, *get_args(ImageStatus)[1:], "where", "excluded", "placeholder", DUPLICATE, "near_duplicate")
GROUP_COLUMNS = {"num_copies": "i8", "num_similar": "i8", "representative": "?", "distance": "i2"}  # for `where` too
COLUMNS = {**GROUP_COLUMNS, "group": "i8", "copy_of": "i8", "reason": "i1"}  # of an image; keys as numbers, -1: none
KEYS_PER_SHARD = 10**6  # a key is its shard times this, plus its index


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[curate]`."""

    where: str | None = key(
        None,
        "caption only these images: an SQL condition over image columns, num_copies, num_similar, representative and "
        "distance; with one of the last four it is checked after duplicates are found, otherwise before",
    )
    max_distance: int = key(
        31, "near duplicates differ in at most so many of the hash's 256 bits; 0: in none", least=0, most=MAX_DISTANCE
    )
    placeholder: int = key(
        100,
        "drop a picture that has at least so many keys, the first one too; 0: keep the first of any number",
        least=0,
    )
    share: bool = key(
        False,
        "keep the exact duplicates of what is captioned: the first alone is asked about, and each has rows of its own "
        "with the captions and scores of the first",
        stamp_default=False,
    )
    exclude: tuple[str, ...] = key(
        (),
        "drop copies and near duplicates of these pictures: directories of images, images, or text files whose lines "
        "begin with a SHA-256 or a perceptual hash",
        locate="path",
    )


@dataclass(frozen=True, kw_only=True)
class CurationInput:
    """An image row's place in its shard, and the curation of the shard's rows."""

    key: str
    position: int  # in the shard's table
    read: Callable[[], Array]

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


def passes(run: Run) -> Iterable[Pass]:
    """
    Raises:
        ConfigError: `where` is not a valid condition, or a path to exclude cannot be read.
    """
    for config in run.sections["curate"].values():
        columns = find_columns(run, config.where)
        try:
            excluded = [describe_excluded(Path(path)) for path in config.exclude]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{run.file}: curate.exclude", str(error)) from error
        yield Pass(
            stage="curate",
            folder="curation",
            reads=("image",),
            reads_all=("image",),
            version=VERSION,
            slice={**stamped(config), "exclude": excluded},
            record=Curation,
            max_error_share=1.0,
            prepare=partial(prepare, config=config, columns=columns),
            inputs=inputs,
            work=work,
        )


def find_columns(run: Run, where: str | None) -> frozenset[str]:
    """The columns that `where` uses.

    Raises:
        ConfigError: it is not a valid condition.
    """
    if where is None:
        return frozenset()
    known = {*column_names(MeasuredImage), *GROUP_COLUMNS}
    try:
        columns = database.find_columns(where, clause=CONDITION)
        if unknown := sorted(columns - known):
            raise QueryError(f"{where!r} uses {', '.join(unknown)}; the columns are {', '.join(sorted(known))}")
        with database.open_condition(where) as meets:
            meets(_add_columns([], column_names(MeasuredImage), _make_rows(0)))
    except QueryError as error:
        raise ConfigError(f"{run.file}: curate.where", str(error)) from error
    return columns


def inputs(shard: Shard) -> Iterator[CurationInput]:
    read = cache(partial(_read_shard, shard))
    for position, image in enumerate(shard.read_table("image", MeasuredImage)):
        yield CurationInput(key=image.key, position=position, read=read)


def work(inputs: Iterator[CurationInput], _: Mapping[str, Engine]) -> Iterator[Curation]:
    for item in inputs:
        row = item.read()[item.position]
        reason = REASONS[row["reason"]]
        yield Curation(
            key=item.key,
            group=_format_key(row["group"]),
            representative=bool(row["representative"]),
            distance=None if row["distance"] < 0 else int(row["distance"]),
            copy_of=_format_key(row["copy_of"]),
            drop=reason != KEPT,
            reason=reason or None,
        )


def _read_shard(shard: Shard) -> Array:
    import numpy as np

    assert shard.ensure_shared is not None
    folder = shard.ensure_shared()
    first, last = np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)[shard.number : shard.number + 2]
    rows: Array = np.array(np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)[first:last])
    return rows


def _format_key(number: int) -> str | None:
    return None if number < 0 else make_key(*divmod(int(number), KEYS_PER_SHARD))


def prepare(shards: AllShards, folder: Path, *, config: Config, columns: frozenset[str]) -> None:
    """Curates all images of the run; writes a row for each, in the plan's order, and the first row of each shard."""
    import numpy as np

    needs_groups = bool(columns & GROUP_COLUMNS.keys())
    images = read_images(shards, "true" if needs_groups or config.where is None else config.where, columns)
    excluded = list(read_excluded(map(Path, config.exclude), num_procs=shards.run.num_cores))
    if excluded:
        num_looks = sum(look is not None for _, look in excluded)
        say(
            f"recap: curate: exclude names {format_quantity(len(excluded), 'picture')}, {format_count(num_looks)} of"
            " them with a perceptual hash; files that are flat, or no images, are found by their bytes alone"
        )
    rows = group_images(images, excluded, config, num_threads=shards.run.num_cores, check_stop=shards.check_stop)
    if needs_groups and config.where is not None:
        _select_groups(rows, images.starts, shards, config.where, columns)
    if config.share:
        _keep_copies(rows, images)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "starts.npy", images.starts)
    counts = {reason: int((rows["reason"] == index).sum()) for index, reason in enumerate(REASONS)}
    words = ", ".join(f"{format_count(num)} {reason or 'kept'}" for reason, num in counts.items() if num)
    say(f"recap: curate: {format_quantity(len(rows), 'image')}: {words or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Images:
    """All images of the run, in the plan's order."""

    starts: Array  # the first image of each shard, and at the end the number of images
    reasons: Array  # index in `REASONS`: the status, or where
    digests: Array  # SHA-256 as 4 words
    hashes: Array  # perceptual hash as 4 words
    has_hash: Array

    @property
    def keys(self) -> Array:
        import numpy as np

        shard = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        keys: Array = shard * KEYS_PER_SHARD + np.arange(len(shard)) - self.starts[shard]
        return keys


def read_images(shards: AllShards, where: str, columns: Iterable[str]) -> Images:
    """Reads the image tables of all shards; images that do not meet `where` have it as their reason."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    names = list(dict.fromkeys(("status", "sha256", "phash", *(set(columns) - GROUP_COLUMNS.keys()))))
    statuses = pa.array(get_args(ImageStatus))
    starts, parts = [0], [(np.empty(0, np.int8), *(np.empty((0, 4), np.uint64),) * 2, np.empty(0, bool))]
    with database.open_condition(where) as meets:
        for _, batches in shards.read_tables("image", MeasuredImage, names):
            starts.append(starts[-1])
            for batch in batches:
                reasons = pc.index_in(batch.column("status"), value_set=statuses).to_numpy(zero_copy_only=False)
                selected = meets(pa.Table.from_batches([batch]))
                reasons = np.where((reasons == 0) & ~selected, REASONS.index("where"), reasons).astype(np.int8)
                hashes, has_hash = parse_digests(batch.column("phash").to_pylist())
                parts.append((reasons, parse_digests(batch.column("sha256").to_pylist())[0], hashes, has_hash))
                starts[-1] += len(batch)
    reasons, digests, hashes, has_hash = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Images(starts=np.array(starts), reasons=reasons, digests=digests, hashes=hashes, has_hash=has_hash)


def parse_digests(texts: Sequence[str | None]) -> tuple[Array, Array]:
    """Digests of 64 hex digits as rows of 4 words, zeros where there is none; and where there is one."""
    import numpy as np

    data = bytes.fromhex("".join(text or "0" * 64 for text in texts))
    has_digest = np.array([text is not None for text in texts], bool)
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 4), has_digest


def group_images(
    images: Images,
    excluded: Sequence[tuple[str, str | None]],
    config: Config,
    *,
    num_threads: int = 1,
    check_stop: Callable[[], None] = lambda: None,
) -> Array:
    """The curation of each image: `COLUMNS`.

    Images with equal hashes are one picture; flat ones, which have none, are where their bytes are equal. Growth of the
    corpus changes no row of an earlier image but by its counts, because everything depends on earlier images alone.
    """
    import numpy as np

    rows, usable = _make_rows(len(images.reasons)), np.flatnonzero(images.reasons == 0)
    rows["reason"] = images.reasons
    digests, has_hash, keys = images.digests[usable], images.has_hash[usable], images.keys[usable]
    identity = np.where(has_hash[:, None], images.hashes[usable], digests)
    copy, picture = _find_first(digests), _find_first(np.column_stack((has_hash, identity)))
    pictures, which = np.unique(picture, return_inverse=True)  # the first image of each picture; images -> pictures
    named, looks = parse_digests([sha for sha, _ in excluded])[0], parse_digests([p for _, p in excluded if p])[0]
    searched = np.flatnonzero(has_hash[pictures])
    pairs = find_pairs(
        np.concatenate((looks, identity[pictures[searched]])),
        max_distance=config.max_distance,
        num_threads=num_threads,
        check_stop=check_stop,
    )
    if pairs.num_passed_over:
        many = format_quantity(pairs.num_passed_over, "picture")
        say(f"recap: curate: {many} are too much like very many others to be compared with all; some copies may stay")
    to_excluded = np.full(len(pictures), -1)
    to_excluded[searched] = _measure_overlap(pairs, len(looks), len(searched))
    is_excluded = (to_excluded >= 0)[which] | _is_among(digests, named)
    is_placeholder = (np.bincount(which) >= (config.placeholder or np.inf))[which] & ~is_excluded
    dropped = np.zeros(len(pictures), bool)
    dropped[which[is_excluded | is_placeholder]] = True
    leader, distance = np.arange(len(pictures)), np.zeros(len(pictures), np.int64)
    found, steps = choose_representatives(len(searched), _drop_pairs(pairs, len(looks), dropped[searched]))
    leader[searched], distance[searched] = searched[found], steps
    group = pictures[leader[which]]
    is_kept = group == np.arange(len(usable))
    reason = np.select(
        [is_excluded, is_placeholder, is_kept, copy != np.arange(len(usable))],
        [REASONS.index(name) for name in ("excluded", "placeholder", KEPT, DUPLICATE)],
        REASONS.index("near_duplicate"),
    )
    grouped = ~(is_excluded | is_placeholder)
    rows["reason"][usable] = reason
    rows["group"][usable] = np.where(grouped, keys[group], -1)
    rows["representative"][usable] = is_kept & grouped
    rows["distance"][usable] = np.where(grouped, distance[which], to_excluded[which])
    rows["copy_of"][usable] = keys[copy]
    rows["num_copies"][usable] = np.bincount(copy, minlength=len(usable))[copy]
    rows["num_similar"][usable] = np.bincount(group[grouped], minlength=len(usable))[group]
    return rows


def _measure_overlap(pairs: Pairs, num_excluded: int, num: int) -> Array:
    """For each of `num` hashes, which follow the excluded ones, the distance to the nearest of those, or -1."""
    import numpy as np

    distance = np.full(num, NUM_BITS + 1)
    overlap = (pairs.earlier < num_excluded) & (pairs.later >= num_excluded)
    np.minimum.at(distance, pairs.later[overlap] - num_excluded, pairs.distance[overlap])
    return np.where(distance > NUM_BITS, -1, distance)


def _make_rows(num: int) -> Array:
    import numpy as np

    rows: Array = np.full(num, -1, [*COLUMNS.items()])
    rows["representative"] = False
    return rows


def _find_first(values: Array) -> Array:
    """For each row the first row that is equal to it."""
    import numpy as np

    order = np.lexsort(values.T)  # stable, so that the first of equal rows comes first
    is_new = np.ones(len(order), bool)
    is_new[1:] = (values[order[1:]] != values[order[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def _is_among(rows: Array, others: Array) -> Array:
    """Marks the rows that are equal to one of the others."""
    import numpy as np

    first = _find_first(np.concatenate((others, rows)))
    is_among: Array = first[len(others) :] < len(others)
    return is_among


def _drop_pairs(pairs: Pairs, num_before: int, dropped: Array) -> Pairs:
    """The pairs without the first `num_before` hashes and those that are dropped; the others are numbered from 0."""
    keep = pairs.earlier >= num_before
    earlier, later, distance = pairs.earlier[keep] - num_before, pairs.later[keep] - num_before, pairs.distance[keep]
    keep = ~(dropped[earlier] | dropped[later])
    return Pairs(earlier=earlier[keep], later=later[keep], distance=distance[keep])


def _select_groups(rows: Array, starts: Array, shards: AllShards, where: str, columns: frozenset[str]) -> None:
    """Gives the kept rows that do not meet `where`, a condition over groups too, this reason."""
    names = ["key", *sorted(columns - GROUP_COLUMNS.keys() - {"key"})]
    with database.open_condition(where) as meets:
        for shard, batches in shards.read_tables("image", MeasuredImage, names):
            own = rows[starts[shard] : starts[shard + 1]]
            selected = meets(_add_columns(batches, names, own))
            own["reason"][(own["reason"] == 0) & ~selected] = REASONS.index("where")


def _keep_copies(rows: Array, images: Images) -> None:
    """Keeps the exact duplicates of images that are kept."""
    import numpy as np

    copies = np.flatnonzero(rows["reason"] == REASONS.index(DUPLICATE))
    shards, indexes = np.divmod(rows["copy_of"][copies], KEYS_PER_SHARD)
    is_kept = rows["reason"][images.starts[shards] + indexes] == REASONS.index(KEPT)
    rows["reason"][copies[is_kept]] = REASONS.index(KEPT)


def _add_columns(batches: Iterable[pa.RecordBatch], names: Iterable[str], rows: Array) -> pa.Table:
    """Image rows with these columns and those of groups; a distance below 0 is NULL."""
    import pyarrow as pa

    fields = arrow_schema(MeasuredImage)
    table = pa.Table.from_batches(batches, schema=pa.schema([fields.field(name) for name in names]))
    for name in GROUP_COLUMNS:
        values = pa.array(rows[name], mask=rows[name] < 0 if name == "distance" else None)
        table = table.append_column(name, values)
    return table
