"""The keys of `[export]` and what follows from them alone: columns, forms and their folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from math import inf
from types import ModuleType
from typing import Literal

from pipeline import plugins
from pipeline.errors import UnknownNameError
from pipeline.records import Exported, column_names
from pipeline.sections import key
from stages.text.selection import TextConfig

RESERVED = {"captions", "data", "images", "index", "webshart"}  # folders of forms


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
    shard_bytes: int = key(
        0,
        "bytes of images and texts in a file, about; the files are then numbered without gaps over the whole run. "
        "0: a file for each shard of the run",
        least=0,
        stamp_default=False,
    )
    shuffle: int | None = key(
        None, "a seed: the samples of the whole run are in random order", least=0, stamp_default=False
    )
    buckets: tuple[float, ...] = key(
        (),
        "aspects, width by height, such as [0.67, 1.0, 1.5]: all images of a file are nearest to the same one",
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
        if len(set(self.buckets)) < len(self.buckets) or not all(0 < bucket < inf for bucket in self.buckets):
            raise ValueError(f"buckets is {list(self.buckets)}; it must have different aspects above 0, such as 1.5")
        if not self.instructions:
            raise ValueError("instructions is empty; it must have at least one text")
        try:
            for name in self.formats:
                plugins.load("stages.exporters", name)
        except UnknownNameError as error:
            raise ValueError(f"formats names a form that does not exist: {error}") from error
        if self.split is not None:
            self._check_split(self.split)
        if self.images == "reference" and not any(
            getattr(load_form(f), "REFERENCES_IMAGES", False) for f in self.formats
        ):
            problem = 'images = "reference" has no effect: only the forms messages, llava and sidecar name image files'
            raise ValueError(f"{problem}, and formats is {list(self.formats)}")
        whole = [name for name in self.formats if not getattr(load_form(name), "DIVIDES", True)]
        if self.is_divided and whole:
            problem = f"shard_bytes, shuffle and buckets repartition the training set, but files of {whole[0]} follow"
            raise ValueError(f"{problem} those of the corpus; leave out one or the other")
        if not re.fullmatch(r"[\w.-]*", self.license):
            raise ValueError(f"license is {self.license!r}; it must be an identifier of the Hub, such as cc-by-4.0")

    @property
    def is_divided(self) -> bool:
        """True if the training set's files are not those of the run's shards."""
        return bool(self.shard_bytes or self.buckets) or self.shuffle is not None

    @property
    def reencodes(self) -> bool:
        """True if image files may differ from the corpus's."""
        return self.upright or bool(self.resize)

    def _check_split(self, split: Mapping[str, float]) -> None:
        wrong = [name for name in split if not re.fullmatch(r"[a-z]\w*", name) or name in RESERVED]
        if wrong or not split or min(split.values()) <= 0:
            raise ValueError(f"split is {dict(split)}; it must have names in small letters, with shares above 0")
        if whole := [name for name in self.formats if "split" not in signature(load_form(name).open).parameters]:
            raise ValueError(f"split is set, but the form {whole[0]} does not write splits; see docs/extending.md")


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig, FormConfig):  # the last one's keys come first
    def __post_init__(self) -> None:
        FormConfig.__post_init__(self)
        TextConfig.__post_init__(self)


def list_columns(settings: Config) -> tuple[str, ...]:
    """The columns of a training set: those of `Exported` without the ones that only other settings fill."""
    used = {
        **dict.fromkeys(("reencoded", "written_sha256"), settings.reencodes),
        **dict.fromkeys(("num_tokens", "cut"), bool(settings.tokenizer)),
        "texts": settings.texts == "all",
        "weight": bool(settings.weight),
    }
    return tuple(name for name in column_names(Exported) if used.get(name, True))


def needs_images(settings: Config) -> bool:
    """True if a form has the bytes of images. Without a copy, there are none in those that can reference them."""
    forms = (load_form(name) for name in settings.formats)
    may_reference = settings.images == "reference"
    return any(
        getattr(form, "NEEDS_IMAGES", True) and not (may_reference and getattr(form, "REFERENCES_IMAGES", False))
        for form in forms
    )


def load_form(name: str) -> ModuleType:
    return plugins.load("stages.exporters", name)


def list_indexes(settings: Config) -> Iterator[str]:
    """The files that the forms' `write_index` may write, relative to the run."""
    for form, folder in list_folders(settings):
        for name in getattr(form, "INDEXES", ()):
            yield f"{folder}{name}"


def list_folders(settings: Config) -> Iterator[tuple[ModuleType, str]]:
    """The forms, each with its folders relative to the run: one, or one for each split."""
    for name in settings.formats:
        for split in settings.split or ("",):
            yield load_form(name), f"export/{name.rpartition('.')[2]}/{split and f'{split}/'}"
