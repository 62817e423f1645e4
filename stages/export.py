"""Export stage: the training set, with one sample for each image that has a chosen caption.

The summary of the whole run (stats.json, the dataset card) is computed from the index table that this stage writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, Literal

from pipeline import plugins
from pipeline.decoding.probe_pool import map_ahead
from pipeline.decoding.upright import copy_upright
from pipeline.engines import Engine
from pipeline.errors import ConfigError, MachineError, UndecodableError, UnknownNameError, UserError
from pipeline.execution.passes import Pass, Shard
from pipeline.progress import say
from pipeline.records import Exported, ExportedText, Image, column_names
from pipeline.sections import Run, key, stamped
from pipeline.storage import database, tables
from pipeline.storage.database import list_score_folders
from pipeline.storage.payloads import write_sums
from stages.exporters import ExportPayload, ExportSample, FormFile, Origin, put_text
from stages.exporters._card import build_card
from stages.exporters._kept_texts import KeptText, build_query, list_raw_folders, read_texts, write_threshold
from stages.exporters._splits import draw_split
from stages.sql import find_scores
from stages.text.prompts import derive_seed
from stages.text.selection import (
    Count,
    TextConfig,
    choose_text,
    cut_text,
    describe_texts,
    excerpt_text,
    load_counter,
)

VERSION = 1
WHOLE_FILES = ("export/stats.json", "export/README.md")  # of the whole run
RESERVED = {"captions", "data", "images", "index", "webshart"}  # folders of forms
GROUPS = 'SELECT key, "group" FROM curation WHERE "group" IS NOT NULL'


@dataclass(frozen=True, kw_only=True)
class FormConfig:
    """The keys of `[export]` that decide its files."""

    formats: tuple[str, ...] = key(
        ("webdataset", "parquet"),
        "forms to write: files of stages/exporters/, or modules of your own with a dot. `recap init` names one",
    )
    image_extension: Literal["jpg", "original"] = key(
        "jpg",
        "of all images, whose bytes are the original's either way. Loaders that infer columns from the first samples "
        "need the same extension for all",
    )
    upright: bool = key(
        False,
        "re-encode the images that an EXIF orientation turns, with their pixels upright, for readers that ignore it: "
        "JPEG at quality 95, other formats as PNG",
        stamp_default=False,
    )
    resize: Mapping[str, int] | None = key(
        None,
        "scale larger images down, upright: { short = 512 } pixels of the shorter side, or { long = 1024 } of the "
        "longer; the others stay as they are",
        stamp_default=False,
    )
    quality: int = key(95, "of the JPEG files that upright and resize write", least=1, most=100, stamp_default=False)
    split: Mapping[str, float] | None = key(
        None,
        "NAME = share: parts of the training set, such as train and val, each in a folder of its own. Copies of a "
        "picture are in one part: the near copies that curate grouped, or else equal files",
        stamp_default=False,
    )
    images: Literal["copy", "reference"] = key(
        "copy",
        "copy the image files into the forms messages, llava and sidecar, or have them name the corpus's own files",
        stamp_default=False,
    )
    instructions: tuple[str, ...] = key(
        ("Describe this image in detail.",),
        "the user's turn in the forms messages and llava; each image draws one, seeded by its key",
        stamp_default=False,
    )
    license: str = key("", "of the corpus, for the dataset card, such as cc-by-4.0", stamp=False)
    url: str = key(
        "",
        "where `recap run export` and `recap push` upload the finished export to, such as s3://bucket/name; also a"
        " repository of the Hub, hf://datasets/USER/NAME",
        stamp=False,
        locate="path",
    )

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            choices = ", ".join(plugins.list_names("stages.exporters"))
            raise ValueError(f"formats is {list(self.formats)}; it must name at least one of {choices}, each once")
        if len({name.rpartition(".")[2] for name in self.formats}) < len(self.formats):
            raise ValueError(f"formats is {list(self.formats)}; two of them would write to one folder of export/")
        resize = self.resize or {"long": 1}
        if not (len(resize) == 1 and resize.keys() <= {"short", "long"} and min(resize.values()) > 0):
            raise ValueError(f"resize is {dict(resize)}; it must have either short or long, in pixels")
        if self.reencodes and self.images == "reference":
            problem = 'upright and resize re-encode images, and images = "reference" leaves them as they are'
            raise ValueError(f"{problem}; choose one")
        if self.split is not None:
            self._check_split(self.split)
        if not self.instructions:
            raise ValueError("instructions is empty; it must have at least one text")
        try:
            for name in self.formats:
                plugins.load("stages.exporters", name)
        except UnknownNameError as error:
            raise ValueError(f"formats names a form that does not exist: {error}") from error
        if not re.fullmatch(r"[\w.-]*", self.license):
            raise ValueError(f"license is {self.license!r}; it must be an identifier of the Hub, such as cc-by-4.0")

    @property
    def reencodes(self) -> bool:
        """True if image files may differ from the corpus's."""
        return self.upright or bool(self.resize)

    def _check_split(self, split: Mapping[str, float]) -> None:
        wrong = [name for name in split if not re.fullmatch(r"[a-z]\w*", name) or name in RESERVED]
        if wrong or not split or min(split.values()) <= 0:
            raise ValueError(f"split is {dict(split)}; it must have names in small letters, with shares above 0")
        if whole := [name for name in self.formats if "split" not in signature(_load_form(name).open).parameters]:
            raise ValueError(f"split is set, but the form {whole[0]} does not write splits; see docs/extending.md")


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig, FormConfig):  # the last one's keys come first
    def __post_init__(self) -> None:
        FormConfig.__post_init__(self)
        TextConfig.__post_init__(self)


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


def passes(run: Run) -> Iterable[Pass]:
    settings: Config = run.sections["export"][""]
    captions = list(run.sections["caption"])
    if not captions:
        return
    rules = run.sections["filter"][""].rules
    scores = [score for rule, sql in rules.items() for score in find_scores(run, f"filter.rules.{rule}", sql)]
    query, scores = build_query(run, settings, scores)
    groups, folders = ["curation"] if _has_groups(run, settings) else [], list_score_folders(run, scores)
    yield Pass(
        stage="export",
        folder="export/index",
        reads=("image", *groups, *(f"caption/{name}" for name in captions), *folders, "verdict"),
        reads_all=tuple(list_raw_folders(run, settings)),
        prepare=partial(write_threshold, settings=settings) if settings.raw_top else None,
        version=VERSION,
        slice=build_slice(run, settings),
        record=Exported,
        max_error_share=1.0,
        inputs=partial(inputs, settings=settings, query=query, scores=scores),
        work=partial(work, settings=settings, num_threads=run.num_cores),
        payload=lambda shard: ExportPayload(
            run.folder,
            shard.number,
            formats=settings.formats,
            image_extension=settings.image_extension,
            splits=settings.split or (),
        ),
        finish=finish,
        whole_files=(*WHOLE_FILES, *_list_indexes(settings)),
    )


def build_slice(run: Run, settings: Config) -> dict[str, Any]:
    """The part of the configuration that decides rows; keys at their defaults leave no trace."""
    values = stamped(settings)
    if settings.is_drawn or settings.split or len(settings.instructions) > 1:
        values["seed"] = run.seed
    if isinstance(settings.texts, Mapping):
        values["texts"] = list(settings.texts.items())  # their order decides too
    if settings.texts:
        values["choose"] = run.sections["filter"][""].choose
    if settings.split:
        values["split"] = list(settings.split.items())
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
    columns = list_columns(settings)
    samples = (_build_sample(item, settings, columns) for item in inputs)
    if not settings.reencodes or not _needs_images(settings):
        yield from samples
        return
    reencode = partial(_reencode, settings=settings)
    for sample in map_ahead(samples, reencode, num_threads=num_threads, depth=2 * num_threads):
        if isinstance(sample, Exception):
            raise sample
        yield sample


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


def list_columns(settings: Config) -> tuple[str, ...]:
    """The columns of a training set: those of `Exported` without the ones that only other settings fill."""
    used = {
        **dict.fromkeys(("reencoded", "written_sha256"), settings.reencodes),
        **dict.fromkeys(("num_tokens", "cut"), bool(settings.tokenizer)),
        "texts": settings.texts == "all",
        "weight": bool(settings.weight),
    }
    return tuple(name for name in column_names(Exported) if used.get(name, True))


def _build_sample(item: ExportInput, settings: Config, columns: tuple[str, ...]) -> ExportSample:
    """
    Raises:
        UserError: its image is to be referenced, but is part of a larger file.
    """
    image, shard = item.image, item.shard
    assert image.file
    file = str(shard.locate(image))
    if settings.images == "reference" and image.offset:
        raise UserError(
            f'{shard.run.file}: export.images is "reference", which needs images that are files of their own, but '
            f'{image.source_key} is part of {image.file}; use "copy"'
        )
    draw = derive_seed(shard.run.seed, "instruction", image.key)
    return ExportSample(
        row=_build_row(item),
        origin=Origin(image=image, file=file, name=shard.find_name(image)),
        data=shard.read_image(image) if _needs_images(settings) else b"",
        columns=columns,
        reference=file if settings.images == "reference" else "",
        instruction=settings.instructions[draw % len(settings.instructions)],
        split=draw_split(settings.split, seed=shard.run.seed, group=item.group) if settings.split else "",
    )


def _has_groups(run: Run, settings: Config) -> bool:
    """True if copies are known by the groups of curate, rather than by their bytes alone."""
    return bool(settings.split) and bool(run.sections["curate"])


def _needs_images(settings: Config) -> bool:
    """True if a form has the bytes of images. Without a copy, there are none in those that can reference them."""
    forms = (_load_form(name) for name in settings.formats)
    may_reference = settings.images == "reference"
    return any(
        getattr(form, "NEEDS_IMAGES", True) and not (may_reference and getattr(form, "REFERENCES_IMAGES", False))
        for form in forms
    )


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


def _load_counter(run: Run, name: str) -> Count:
    try:
        return load_counter(name)
    except OSError as error:
        raise ConfigError(f"{run.file}: export.tokenizer", str(error)) from error


SUMMARY = """
    SELECT count(*) AS num_samples, coalesce(sum(num_bytes), 0)::BIGINT AS num_bytes,
        count(DISTINCT sha256) AS num_distinct_images,
        coalesce(avg(len(regexp_extract_all(caption, '\\S+'))), 0) AS mean_words,
        coalesce(avg(len(regexp_extract_all(alt_text, '\\S+'))), 0) AS mean_alt_text_words
    FROM export"""
NO_PROVENANCE = tables.Provenance(stage="export", name="", version=VERSION, slice={}, inputs={})  # they fill memory
OLDER = "SELECT count(*) FROM export WHERE orientation IS NULL"  # samples that an earlier version exported


DROPPED = 'SELECT reason, count(*) FROM curation WHERE "drop" GROUP BY reason ORDER BY reason'


def finish(run: Run, is_new: bool) -> None:
    """Writes export/stats.json, the dataset card, the forms' indexes and all digests, unless no shard is new."""
    settings = run.sections["export"][""]
    if not is_new and all((run.folder / name).exists() for name in WHOLE_FILES):
        return
    with database.connect(run.folder) as connection:
        result = database.run_query(connection, SUMMARY)
        stats = dict(zip([column[0] for column in result.description or ()], result.fetchone() or (), strict=True))
        passes = database.run_query(
            connection, "SELECT caption_pass, model, count(*) FROM export GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        num_older: int = database.run_query(connection, OLDER).fetchall()[0][0]
        dropped = dict(database.query_rows(connection, DROPPED)) if run.sections["curate"] else {}
    stats |= {"dropped": dropped} if dropped else {}
    stats["captions"] = [{"pass": name, "model": model, "num_samples": num} for name, model, num in passes]
    card = build_card(
        stats,
        title=run.folder.name,
        source=run.source.kind,
        license=settings.license,
        formats=settings.formats,
        splits=settings.split or (),
        rules=run.sections["filter"][""].rules,
        notes=(*_describe_dropped(dropped), *describe_texts(settings)),
        columns=list_columns(settings),
    )
    for name, text in zip(WHOLE_FILES, (json.dumps(stats, indent=2) + "\n", card), strict=True):
        put_text(run.folder / name, text)
    paths = sorted((run.folder / "export/index").glob("*.parquet"))
    found = (footer for footer in map(tables.read_whole_footer, paths) if footer)
    footers = [replace(footer, provenance=NO_PROVENANCE) for footer in found]
    _write_indexes(run.folder, settings, footers)
    names = (name for name in (*WHOLE_FILES, *_list_indexes(settings)) if (run.folder / name).exists())
    write_sums(run.folder, "export/index", footers, names)
    _warn(run, stats["num_samples"], num_older)


def _describe_dropped(dropped: Mapping[str, int]) -> Iterator[str]:
    if dropped:
        reasons = ", ".join(f"{num:,} `{reason}`" for reason, num in dropped.items())
        yield f"Before captioning, curation dropped {sum(dropped.values()):,} images of the corpus: {reasons}."


def _warn(run: Run, num_samples: int, num_older: int) -> None:
    if not num_samples:
        say("recap: WARNING: no caption was kept, so the training set is empty; `recap query refusals` counts why")
    if 0 < num_older < num_samples:
        say(
            f"recap: WARNING: an earlier version exported {num_older} of {num_samples} samples without some columns; "
            "loaders refuse such a mixture. To export all again: "
            f"rm -r {shlex.quote(str(run.folder / 'export'))} && recap run export --run {shlex.quote(str(run.folder))}"
        )


def _load_form(name: str) -> ModuleType:
    return plugins.load("stages.exporters", name)


def _list_indexes(settings: Config) -> Iterator[str]:
    """The files that the forms' `write_index` may write, relative to the run."""
    for form, folder in _list_folders(settings):
        for name in getattr(form, "INDEXES", ()):
            yield f"{folder}{name}"


def _list_folders(settings: Config) -> Iterator[tuple[ModuleType, str]]:
    """The forms, each with its folders relative to the run: one, or one for each split."""
    for name in settings.formats:
        for split in settings.split or ("",):
            yield _load_form(name), f"export/{name.rpartition('.')[2]}/{split and f'{split}/'}"


def _write_indexes(run: Path, settings: Config, footers: Sequence[tables.TableFooter]) -> None:
    """Writes each form's files of the whole run, from the footers of all index tables."""
    for module, folder in _list_folders(settings):
        files = [
            FormFile(name=name.removeprefix(folder), num_bytes=num_bytes)
            for footer in footers
            for name, num_bytes in footer.payload.items()
            if name.startswith(folder)
        ]
        if hasattr(module, "write_index"):
            module.write_index(run / folder, files)
