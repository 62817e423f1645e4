"""Export stage: the training set, with one sample for each image that has a chosen caption.

Which texts are exported, and which file a sample belongs to, is decided by helpers in stages/exporters/.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from pipeline.decoding.probe_pool import map_ahead, raise_errors
from pipeline.decoding.upright import copy_upright
from pipeline.engines import Engine
from pipeline.errors import ConfigError, MachineError, UndecodableError, UserError
from pipeline.execution.passes import NUM_READERS, Pass, Shard, no_payload
from pipeline.records import Exported, ExportedText, Image, Placed, Selected, column_names
from pipeline.sections import Run, stamped
from pipeline.storage.database import list_score_folders
from stages.exporters import ExportPayload, ExportSample, Origin
from stages.exporters._division import OutputFile, divide, list_own_files, read_file
from stages.exporters._kept_texts import (
    KeptText,
    build_query,
    find_text_finders,
    list_raw_folders,
    read_texts,
    write_threshold,
)
from stages.exporters._settings import Config, list_columns, list_indexes, needs_images
from stages.exporters._splits import draw_split
from stages.exporters._whole import WHOLE_FILES, finish
from stages.text.conditions import find_rule_scores, list_competing, list_finder_folders
from stages.text.prompts import derive_seed
from stages.text.selection import (
    Count,
    choose_text,
    cut_text,
    excerpt_text,
    load_counter,
)

VERSION = 1
SELECTED = "selected"  # folder of the samples of a repartitioned training set
FILE_KEYS = {"formats", "image_extension", "instructions", "images", "shard_bytes", "shuffle"}  # decide files alone
READ_AHEAD = 4  # samples
BYTES_OF_ROW = 500  # of a sample's other columns, about
GROUPS = 'SELECT key, "group" FROM curation WHERE "group" IS NOT NULL'


@dataclass(frozen=True, kw_only=True)
class ExportInput:
    """The text that was chosen for an image, all kept ones, its row, and the shard that reads the image file."""

    image: Image
    text: KeptText
    texts: tuple[KeptText, ...]
    group: str  # of copies of the image
    shard: Shard

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.image.key,)


@dataclass(frozen=True, kw_only=True)
class PlacedInput:
    """A selected sample with its file, and the shard that writes it."""

    selected: Selected
    file: OutputFile
    position: int
    shard: Shard

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.file.split, self.file.number, self.position)


def passes(run: Run) -> Iterable[Pass]:
    settings: Config = run.sections["export"][""]
    if not run.sections["caption"]:
        return
    captions = list_competing(run)
    query, scores = build_query(run, settings, sorted(set[str]().union(*find_rule_scores(run).values())))
    groups = ["curation"] if _has_groups(run, settings) else []
    folders = [
        *list_finder_folders(find_text_finders(run, settings)),
        *list_score_folders(run, scores, captions=captions),
    ]
    own = Pass(
        stage="export",
        folder="export/index",
        reads=("image", *groups, *(f"caption/{name}" for name in captions), *folders, "verdict"),
        reads_all=tuple(list_raw_folders(run, settings)),
        prepare=partial(write_threshold, settings=settings) if settings.raw_top else None,
        version=VERSION,
        slice=build_slice(run, settings),
        record=Exported,
        max_error_share=1.0,
        overlaps=True,
        inputs=partial(inputs, settings=settings, query=query, scores=scores),
        work=partial(work, settings=settings, num_threads=run.num_cores),
        payload=partial(_open_payload, settings=settings),
        finish=finish,
        check=partial(_check_settings, run, settings),
        whole_files=(*WHOLE_FILES, *list_indexes(settings)),
    )
    if not settings.is_divided:
        yield own
        return
    yield replace(
        own,
        name="select",
        folder=SELECTED,
        slice={name: value for name, value in own.slice.items() if name not in FILE_KEYS}
        | {"has_images": needs_images(settings)},
        record=Selected,
        work=partial(select, settings=settings),
        payload=no_payload,
        finish=None,
        check=None,
        whole_files=(),
    )
    yield replace(
        own,
        reads=(SELECTED,),
        reads_all=(SELECTED,),
        prepare=partial(
            divide,
            source=SELECTED,
            seed=settings.shuffle,
            file_bytes=settings.shard_bytes,
            splits=tuple(settings.split or ("",)),
        ),
        record=Placed,
        inputs=place_inputs,
        work=partial(write_placed, settings=settings, num_threads=run.num_cores),
        payload=partial(_open_payload, settings=settings),
    )


def _open_payload(shard: Shard, settings: Config) -> ExportPayload:
    return ExportPayload(
        shard.run.folder,
        shard.number,
        formats=settings.formats,
        image_extension=settings.image_extension,
        splits=None if settings.is_divided else settings.split or ("",),
    )


def build_slice(run: Run, settings: Config) -> dict[str, Any]:
    """The part of the configuration that decides rows; keys at their defaults leave no trace."""
    values = stamped(settings)
    if settings.is_drawn or settings.split or len(settings.instructions) > 1:
        values["seed"] = run.seed
    if isinstance(settings.texts, Mapping):
        values["texts"] = [[*item] for item in settings.texts.items()]  # their order decides too
    if settings.texts:
        values["choose"] = run.sections["filter"][""].choose
    if settings.split:
        values["split"] = [[*item] for item in settings.split.items()]
    return values


def inputs(shard: Shard, *, settings: Config, query: str, scores: Sequence[str]) -> Iterator[ExportInput]:
    """Chooses each image's text among the kept ones; texts and image rows are sorted by key."""
    images = shard.read_table("image", Image)
    groups = dict(shard.query(GROUPS)) if _has_groups(shard.run, settings) else {}
    for name, texts in read_texts(shard, query, scores, has_threshold=settings.raw_top > 0):
        if text := choose_text(texts, settings, seed=shard.run.seed, key=name):
            image = next(image for image in images if image.key == name)
            group = groups.get(name, image.sha256 or "")
            yield ExportInput(image=image, text=text, texts=tuple(texts), group=group, shard=shard)


def work(
    inputs: Iterator[ExportInput], _: Mapping[str, Engine], *, settings: Config, num_threads: int
) -> Iterator[ExportSample]:
    columns, has_images = list_columns(settings), needs_images(settings)
    build = partial(_build_sample, settings=settings, columns=columns, has_images=has_images)
    if not has_images:
        yield from map(build, inputs)
        return
    # One thread reads and checks images while this one writes them; a second would read another tar at the same time.
    samples = raise_errors(map_ahead(inputs, build, num_threads=1, depth=READ_AHEAD))
    if settings.reencodes:
        reencode = partial(_reencode, settings=settings)
        samples = raise_errors(map_ahead(samples, reencode, num_threads=num_threads, depth=2 * num_threads))
    yield from samples


def _reencode(sample: ExportSample, settings: Config) -> ExportSample:
    """The sample with an upright image file that is small enough; unchanged where it is both already.

    Raises:
        MachineError: its image cannot be decoded.
    """
    size = find_size(sample.row.width, sample.row.height, settings.resize or {})
    if size is None and (sample.row.orientation == 1 or not settings.upright):
        return sample
    try:
        copy = copy_upright(sample.data, size=size, quality=settings.quality)
    except UndecodableError as error:
        raise MachineError(f"{sample.row.source_key} cannot be encoded again: {error}") from error
    row = replace(
        sample.row,
        format=copy.format,
        width=copy.width,
        height=copy.height,
        orientation=1,
        num_bytes=len(copy.data),
        reencoded=copy.encoding,
        written_sha256=hashlib.sha256(copy.data).hexdigest(),
    )
    return replace(sample, row=row, data=copy.data)


def find_size(width: int, height: int, resize: Mapping[str, int]) -> tuple[int, int] | None:
    """Width and height of the scaled image; None where it is not larger than `resize` allows.

    >>> find_size(4000, 3000, {"short": 512}), find_size(400, 300, {"short": 512}), find_size(90, 10, {"long": 30})
    ((683, 512), None, (30, 3))
    """
    side = min(width, height) if "short" in resize else max(width, height)
    most = next(iter(resize.values()), side)
    if side <= most:
        return None
    return max(1, round(width * most / side)), max(1, round(height * most / side))


def select(inputs: Iterator[ExportInput], _: Mapping[str, Engine], *, settings: Config) -> Iterator[Selected]:
    """The rows of the samples, with their part of the training set and the place of their image, but no image."""
    splits, has_images = list(settings.split or ("",)), needs_images(settings)
    for item in inputs:
        image, row, split = item.image, _build_row(item), _draw_split(item, settings)
        bucket = _find_bucket(row.width / row.height, settings.buckets)
        assert image.file is not None and image.offset is not None
        _check_reference(item, settings)
        yield Selected(
            **vars(row),
            source=image.source,
            file=image.file,
            name=item.shard.find_name(image),
            offset=image.offset,
            part=splits.index(split) * (len(settings.buckets) or 1) + bucket,
            split=split,
            bucket=settings.buckets[bucket] if settings.buckets else 0.0,
            num_estimated=_estimate_bytes(row, settings, has_image=has_images),
        )


def _find_bucket(aspect: float, buckets: Sequence[float]) -> int:
    """The index of the bucket whose ratio to the aspect is the smallest; 0 without buckets."""
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i] / aspect)), default=0)


def _estimate_bytes(row: Exported, settings: Config, *, has_image: bool) -> int:
    """The bytes of a sample's image, scaled down with its pixels, and of its texts."""
    texts = (row.caption, row.alt_text, row.fields, row.metadata, row.source_key, *(one.text for one in row.texts))
    size, image = find_size(row.width, row.height, settings.resize or {}), row.num_bytes if has_image else 0
    if size is not None:
        image = image * size[0] * size[1] // (row.width * row.height)
    return image + sum(len(text.encode(errors="replace")) for text in texts) + BYTES_OF_ROW


def place_inputs(shard: Shard) -> Iterator[PlacedInput]:
    """The samples of the files that this shard writes, in their order."""
    assert shard.ensure_shared is not None
    folder = shard.ensure_shared()
    for file in list_own_files(folder, shard.number):
        for position, selected in enumerate(read_file(folder, file)):
            yield PlacedInput(selected=selected, file=file, position=position, shard=shard)


def write_placed(
    inputs: Iterator[PlacedInput], _: Mapping[str, Engine], *, settings: Config, num_threads: int
) -> Iterator[ExportSample]:
    """The samples with their images, which are read ahead: they are all over the corpus."""
    columns, has_images = list_columns(settings), needs_images(settings)
    read = partial(_place_sample, settings=settings, columns=columns, has_images=has_images)
    yield from raise_errors(map_ahead(inputs, read, num_threads=max(NUM_READERS, num_threads), depth=2 * NUM_READERS))


def _place_sample(item: PlacedInput, *, settings: Config, columns: tuple[str, ...], has_images: bool) -> ExportSample:
    selected, shard = item.selected, item.shard
    values, path = vars(selected), shard.place(selected.file, selected.name)
    own = {name: values[name] for name in column_names(Exported)}
    image = Image(
        **{name: values[name] for name in column_names(Image) if name in values},
        shard=int(selected.key[:6]),
        index=int(selected.key[6:]),
        status="ok",
        error=None,
        num_frames=None,
    )
    sample = _make_sample(
        Placed(**own, split=selected.split, bucket=selected.bucket, number=item.file.number, position=item.position),
        Origin(image=image, file=str(path), name=selected.name),
        settings=settings,
        seed=shard.run.seed,
        data=shard.read_image(image, path=path) if has_images else b"",
        columns=columns,
        split=selected.split,
    )
    return _reencode(sample, settings) if settings.reencodes and has_images else sample


def _build_sample(item: ExportInput, *, settings: Config, columns: tuple[str, ...], has_images: bool) -> ExportSample:
    image, shard = item.image, item.shard
    _check_reference(item, settings)
    return _make_sample(
        _build_row(item),
        Origin(image=image, file=str(shard.locate(image)), name=shard.find_name(image)),
        settings=settings,
        seed=shard.run.seed,
        data=shard.read_image(image) if has_images else b"",
        columns=columns,
        split=_draw_split(item, settings),
    )


def _make_sample(
    row: Exported,
    origin: Origin,
    *,
    settings: Config,
    seed: int,
    data: bytes,
    columns: tuple[str, ...],
    split: str,
) -> ExportSample:
    draw = derive_seed(seed, "instruction", row.key)
    return ExportSample(
        row=row,
        origin=origin,
        data=data,
        columns=columns,
        reference=origin.file if settings.images == "reference" else "",
        instruction=settings.instructions[draw % len(settings.instructions)],
        split=split,
    )


def _draw_split(item: ExportInput, settings: Config) -> str:
    return draw_split(settings.split, seed=item.shard.run.seed, group=item.group) if settings.split else ""


def _check_reference(item: ExportInput, settings: Config) -> None:
    """
    Raises:
        UserError: the image is to be referenced, but is part of a larger file.
    """
    image = item.image
    if settings.images == "reference" and image.offset:
        raise UserError(
            f'{item.shard.run.file}: export.images is "reference", which needs images that are files of their own, but '
            f'{image.source_key} is part of {image.file}; use "copy"'
        )


def _has_groups(run: Run, settings: Config) -> bool:
    """True if copies are known by the groups of curate, rather than by their bytes alone."""
    return bool(settings.split) and bool(run.sections["curate"])


def _build_row(item: ExportInput) -> Exported:
    """
    Raises:
        ConfigError: the sample has no weight, or there is no such tokenizer.
    """
    image, text, run = item.image, item.text, item.shard.run
    settings: Config = run.sections["export"][""]
    count = _load_counter(run, settings.tokenizer) if settings.tokenizer else None
    caption = excerpt_text(text, settings, count, seed=run.seed, key=image.key)
    assert image.sha256 and image.format and image.width and image.height and image.num_bytes
    if text.weight is None or not 0 <= text.weight < math.inf:
        problem = f"{settings.weight!r} is {text.weight} for the {text.caption_pass} text of {image.source_key}"
        raise ConfigError(f"{run.file}: export.weight", f"{problem}; it must be 0 or more: see coalesce and greatest")
    return Exported(
        key=image.key,
        source_key=image.source_key,
        sha256=image.sha256,
        caption=caption.text,
        alt_text=image.alt_text or "",
        caption_pass=text.caption_pass,
        candidate=text.candidate,
        model=text.model,
        revision=text.revision,
        fields=text.fields,
        scores=text.scores,
        weight=text.weight,
        num_tokens=caption.num_tokens,
        cut=caption.cut,
        texts=tuple(_cut_text(one, settings, count) for one in item.texts if one.is_kept)
        if settings.texts == "all"
        else (),
        format=image.format,
        width=image.width,
        height=image.height,
        orientation=image.orientation or 1,
        num_bytes=image.num_bytes,
        metadata=image.metadata,
    )


def _cut_text(text: KeptText, settings: Config, count: Count | None) -> ExportedText:
    excerpt, values = cut_text(text.text, settings.max_tokens, count), [score.value for score in text.scores]
    return ExportedText(
        text=excerpt.text,
        caption_pass=text.caption_pass,
        candidate=text.candidate,
        score=fmean(values) if values else -1.0,
        num_tokens=excerpt.num_tokens,
        cut=excerpt.cut,
    )


def _check_settings(run: Run, settings: Config) -> None:
    """Finds before the first caption what would only be found after the last.

    Raises:
        ConfigError: there is no such tokenizer, or a prefix leaves no room for the text.
        MachineError: the Hub does not answer.
    """
    count = _load_counter(run, settings.tokenizer) if settings.tokenizer else None
    for name, prefix in (settings.prefix or {}).items():
        if count and settings.max_tokens and (num := count(prefix)) >= settings.max_tokens:
            problem = f"has {num} tokens, and max_tokens = {settings.max_tokens} leaves none for the text; shorten it"
            raise ConfigError(f"{run.file}: export.prefix.{name}", problem)


def _load_counter(run: Run, name: str) -> Count:
    try:
        return load_counter(name)
    except OSError as error:
        raise ConfigError(f"{run.file}: export.tokenizer", str(error)) from error
