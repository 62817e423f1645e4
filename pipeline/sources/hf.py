"""Datasets of the `datasets` library: their stored rows, images undecoded.

A split is a piece. `_columns` decides the meaning of the columns; the library decides what is downloaded, and where to.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import machine
from pipeline.errors import ConfigError
from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources import _columns, _common, _files, _survey
from pipeline.storage import stores

if TYPE_CHECKING:
    import datasets

MAX_MESSAGE = 400  # characters of the library's errors
BATCH_ROWS = 16  # memory-mapped at a time, without a copy


@dataclass(frozen=True, kw_only=True)
class Config:
    # Located as a model is: a folder beside run.toml when there is one, otherwise a name on the Hub.
    path: str = key(
        help="a dataset on the Hugging Face Hub, a folder, or what save_to_disk wrote, also at a URL", locate="model"
    )
    name: str = key("", "the dataset's configuration, where it has several")
    split: str = key("", "as in load_dataset: train, test[:10%], ...; empty: all splits")
    revision: str = key("", "the branch, tag or commit on the Hub; only a commit keeps rows from changing later")
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
        ConfigError: there is no such dataset or split, or its columns do not match the config.
    """
    for number, (name, split) in enumerate(_open_splits(config).items()):
        columns = _choose_columns(split, config)
        if not number:
            _columns.report_alt_text(split.features.arrow_schema, columns)
        yield Piece(file=name, stop=len(split), num_bytes=split.dataset_size)


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    """The rows of the piece."""
    split = _open_splits(config)[piece.file]
    columns, roots, revision = _choose_columns(split, config), _list_roots(config), _find_revision(split, config)
    rows = split.with_format("arrow")
    stop = len(rows) if piece.stop is None else piece.stop
    for first in range(piece.start, min(stop, len(rows)), BATCH_ROWS):
        batch = rows[first : min(first + BATCH_ROWS, stop)]
        for raw in _columns.read_samples(batch, columns, first=first, name=piece.file, roots=roots):
            yield _add_revision(raw, revision)
    for row in range(max(piece.start, len(rows)), stop):
        yield _columns.make_lost_row(row, name=piece.file, error=f"the split has only {len(rows)} rows now")


def _is_saved_to_disk(path: str) -> bool:
    """By the file that lists several splits, or by the two files of a single one."""
    several, single = {"dataset_dict.json"}, {"state.json", "dataset_info.json"}
    if _files.is_url(path):
        names = stores.list_folder(path).keys() if _survey.is_directory(path) else set()
        return names >= several or names >= single
    return any(all((Path(path) / name).is_file() for name in names) for names in (several, single))


def _open_splits(config: Config) -> Mapping[str, datasets.Dataset]:
    """Opened each time, since a directory may have grown; the rows are memory-mapped, not read."""
    import datasets

    if _is_saved_to_disk(config.path):
        dataset = datasets.load_from_disk(_fetch_folder(config) if _files.is_url(config.path) else config.path)
    else:
        dataset = _load_dataset(config)
    if isinstance(dataset, datasets.Dataset):
        return {config.split or str(dataset.split or "train"): dataset}
    if config.split and config.split not in dataset:
        raise ConfigError("source.split", f"there is no split {config.split!r}; there are {', '.join(dataset)}")
    return {config.split: dataset[config.split]} if config.split else dataset


def _fetch_folder(config: Config) -> str:
    """A local copy of a remote directory, made once for each state of it."""
    import datasets

    files = stores.list_tree(config.path)
    state = hashlib.sha256(json.dumps([config.path, files]).encode()).hexdigest()[:16]
    folder = Path(config.cache or datasets.config.HF_DATASETS_CACHE) / "recap" / state
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            for name in files:
                stores.download_file(f"{config.path}/{name}", Path(work, name))
            with suppress(FileExistsError, NotADirectoryError):  # another process was faster
                Path(work).rename(folder)
                Path(work).mkdir()  # which the context removes
    return str(folder)


def _load_dataset(config: Config) -> datasets.Dataset | datasets.DatasetDict:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(
            config.path,
            config.name or None,
            split=config.split or None,
            revision=config.revision or None,
            cache_dir=config.cache or None,
        )
    except (ValueError, FileNotFoundError, RuntimeError, DatasetsError) as error:
        # What does not exist, a loading script, files of different columns. A disk that fails is behind some of these.
        trouble = machine.find_trouble(error.__cause__ or error)
        if trouble is not None and trouble is not error:
            raise trouble from error
        message = " ".join(f"{error}: {error.__cause__ or ''}".split()).rstrip(":")[:MAX_MESSAGE]
        raise ConfigError("source.path", f"{config.path!r} cannot be loaded: {message}") from error


def _choose_columns(split: datasets.Dataset, config: Config) -> _columns.Columns:
    schema = split.features.arrow_schema  # its metadata says which columns are images
    return _columns.choose_columns(schema, image=config.image, source_key=config.source_key, alt_text=config.alt_text)


def _list_roots(config: Config) -> tuple[str, ...]:
    """Directories where images given only by path may be: the dataset's directory, and the library's caches."""
    import datasets
    from huggingface_hub import constants

    roots = (config.image_root, config.path, config.cache or datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return tuple(str(Path(root).absolute()) for root in roots if root and Path(root).is_dir())


def _find_revision(split: datasets.Dataset, config: Config) -> str:
    """The commit that was downloaded, where the library knows it, otherwise the configured revision."""
    commits = re.findall(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or ()))
    return commits[0] if commits else config.revision


def _add_revision(raw: Raw, revision: str) -> Raw:
    if not revision:
        return raw
    return replace(raw, metadata=_common.format_json({"revision": revision} | json.loads(raw.metadata)))
