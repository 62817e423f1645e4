"""Decides how a dataset of the `datasets` library is read: its rows as they are stored, images undecoded.

A split is a piece. What the columns mean is `_columns`' decision; what is downloaded, and where to, is the library's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 16  # mapped at a time, which copies nothing


@dataclass(frozen=True, kw_only=True)
class Config:
    # Located as a model is: a folder beside run.toml when there is one, otherwise a name on the Hub.
    path: str = key(help="a dataset on the Hugging Face Hub, a folder, or what save_to_disk wrote", locate="model")
    name: str = key("", "the dataset's configuration, where it has several")
    split: str = key("", "as in load_dataset: train, test[:10%], ...; empty: all splits")
    revision: str = key("", "the branch, tag or commit on the Hub; only a commit makes sure that no row changes later")
    image: str = key("", _columns.IMAGE_HELP)
    alt_text: str = key("", _common.ALT_TEXT_HELP)
    source_key: str = key("", _columns.KEY_HELP)
    image_root: str = key("", _columns.ROOT_HELP, stamp=False, locate="path")
    cache: str = key("", "the folder for what the library downloads; empty: its own", stamp=False, locate="path")


def claims(path: str) -> bool:
    """True for `hf:NAME`, a dataset on the Hub, and for a directory that `save_to_disk` wrote."""
    return path.startswith("hf:") or _is_saved_to_disk(path)


def pieces(config: Config) -> Iterator[Piece]:
    """The splits. Downloads the dataset, unless it is in the cache.

    Raises:
        ConfigError: there is no such dataset or split, or its columns are not what the config says.
    """
    for name, split in _splits(config).items():
        _choose(split, config)
        yield Piece(file=name, stop=len(split), num_bytes=split.dataset_size)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the piece."""
    split = _splits(config)[piece.file]
    columns, roots, revision = _choose(split, config), _roots(config), _revision(split, config)
    rows = split.with_format("arrow")
    stop = len(rows) if piece.stop is None else piece.stop
    for first in range(piece.start, min(stop, len(rows)), BATCH_ROWS):
        batch = rows[first : min(first + BATCH_ROWS, stop)]
        for raw in _columns.raws(batch, columns, first=first, name=piece.file, roots=roots):
            yield _with_revision(raw, revision)
    for row in range(max(piece.start, len(rows)), stop):
        yield _columns.lost(row, name=piece.file, error=f"the split has only {len(rows)} rows now")


def _is_saved_to_disk(path: str) -> bool:
    """By the file that names several splits, or by the two of a single one."""
    several, one = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all((Path(path) / name).is_file() for name in names) for names in (several, one))


def _splits(config: Config) -> Mapping[str, datasets.Dataset]:
    """Opened anew each time, for a folder may have grown; the rows are memory-mapped, not read."""
    import datasets

    if _is_saved_to_disk(config.path):
        found = datasets.load_from_disk(config.path)
    else:
        found = _loaded(config)
    if isinstance(found, datasets.Dataset):
        return {config.split or str(found.split or "train"): found}
    if config.split and config.split not in found:
        raise ConfigError("source.split", f"{config.split!r} is not there; the splits are {', '.join(found)}")
    return {config.split: found[config.split]} if config.split else found


def _loaded(config: Config) -> datasets.Dataset | datasets.DatasetDict:
    import datasets

    try:
        return datasets.load_dataset(
            config.path,
            config.name or None,
            split=config.split or None,
            revision=config.revision or None,
            cache_dir=config.cache or None,
        )
    except (ValueError, FileNotFoundError) as error:  # the library's words for what the user named and it lacks
        raise ConfigError("source.path", f"{config.path!r} cannot be loaded: {error}") from error


def _choose(split: datasets.Dataset, config: Config) -> _columns.Columns:
    schema = split.features.arrow_schema  # with the features beside it: which of them are images
    return _columns.choose(schema, image=config.image, source_key=config.source_key, alt_text=config.alt_text)


def _roots(config: Config) -> tuple[str, ...]:
    """Where images may lie of which a row has only the path: the dataset itself, and where the library keeps it."""
    import datasets
    from huggingface_hub import constants

    places = (config.image_root, config.path, config.cache or datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return tuple(str(Path(place).absolute()) for place in places if place and Path(place).is_dir())


def _revision(split: datasets.Dataset, config: Config) -> str:
    """The commit that was downloaded, where the library knows it, otherwise what was asked for."""
    commits = re.findall(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or ()))
    return commits[0] if commits else config.revision


def _with_revision(raw: Raw, revision: str) -> Raw:
    if not revision:
        return raw
    return replace(raw, metadata=_common.to_json({"revision": revision} | json.loads(raw.metadata)))
