"""Export form `lance`: `export/lance`, one Lance dataset of the whole run, with a data file for each shard.

`lance.dataset("export/lance")` has the columns of the training set, and the image file in `image`. Lance names the data
files of a dataset at random, so shards write theirs with its file writer: equal samples give equal files. The manifest,
which lists them, is the only file of the dataset that has the time of the export.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MachineError, UserError
from pipeline.records import Exported, arrow_schema
from pipeline.storage.layout import sweep_unfinished, unfinished_path
from pipeline.storage.tables import place_atomic
from stages.exporters import CardEntry, ExportSample, FormFile
from stages.exporters._folders import UnfinishedFolder

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = f"_versions/{2**64 - 2}.manifest"  # of version 1: Lance counts names down, so that the latest comes first
CARD = CardEntry(image="image", caption="caption", files="lance/data/*.lance")
INDEXES = (MANIFEST,)
FILE_VERSION = "2.1"  # of data files; Lance's default changes between its versions
COMPRESSION = "lance-encoding:compression"  # key of a column's metadata
BATCH_BYTES = 8 << 20  # of images in memory; Lance's writer buffers as much of each column
BATCH_ROWS = 1000
ROWS_AT_ONCE = 100  # while a file is read
ADVICE = "export.formats: lance needs pylance, which is not installed: pip install '.[lance]' in a clone of recap"


def open(run: Path, shard: int, work: Path, split: str = "") -> LanceDataFile:
    """
    Raises:
        UserError: Lance's library is not installed.
    """
    if find_spec("lance") is None:
        raise UserError(ADVICE)
    return LanceDataFile(run, run / "export" / "lance" / split / "data" / f"{shard:05d}.lance", work)


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """
    Raises:
        MachineError: Lance's library is not installed, without which its files cannot be read.
        OSError, ValueError: the file is damaged.
    """
    if find_spec("lance") is None:
        raise MachineError(ADVICE)
    from lance.file import LanceFileReader

    try:
        reader = LanceFileReader(str(path), columns=["key", "image"])
        for batch in reader.read_all(batch_size=ROWS_AT_ONCE, batch_readahead=1).to_batches():
            for row in batch.to_pylist():
                yield row["key"], row["image"]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception: Lance expects whole files
            raise
        raise ValueError(str(error)) from error


def write_index(folder: Path, files: Sequence[FormFile]) -> None:
    """Makes a dataset of the data files, with one version; whatever else Lance has written into the folder is removed.

    The version is committed in a folder of its own, since a commit to the dataset would add to earlier versions.
    """
    sweep_unfinished(folder)
    _remove_later_versions(folder, {file.name for file in files})
    if not files:
        (folder / MANIFEST).unlink(missing_ok=True)  # no file has the columns
        return
    import lance

    schema, fragments = _describe_files(folder, files)
    scratch = unfinished_path(folder / "dataset", work=folder)
    try:
        lance.LanceDataset.commit(str(scratch), lance.LanceOperation.Overwrite(schema, fragments))
        with place_atomic(folder / MANIFEST, work=scratch) as unfinished:
            os.replace(scratch / MANIFEST, unfinished)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_later_versions(folder: Path, names: set[str]) -> None:
    """Removes what users of the dataset may have added: versions, rows, indexes, deletions."""
    own = {folder / name for name in (MANIFEST, *names)}
    added = (path for path in folder.glob("_*") if path.name != "_versions")
    for path in {*added, *folder.glob("_versions/*"), *folder.glob("data/*")} - own:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _describe_files(folder: Path, files: Sequence[FormFile]) -> tuple[pa.Schema, list[Any]]:
    """The columns of all data files, and a fragment for each; columns that only some files have are null in others.

    Lance numbers columns depth first, and a file of version 2.1 has those that have no columns in them.
    """
    from lance.file import LanceFileReader
    from lance.fragment import DataFile, FragmentMetadata
    from lance.schema import LanceSchema

    found = [LanceFileReader(str(folder / file.name)).metadata() for file in files]
    schema = _join_schemas([metadata.schema for metadata in found])
    ids = {field.name(): [*_list_leaves(field)] for field in LanceSchema.from_pyarrow(schema).fields()}
    fragments = []
    for number, (file, metadata) in enumerate(zip(files, found, strict=True)):
        leaves = [leaf for name in metadata.schema.names for leaf in ids[name]]
        data_file = DataFile(
            path=file.name.removeprefix("data/"),
            fields=leaves,
            column_indices=[*range(len(leaves))],
            file_major_version=metadata.major_version,
            file_minor_version=metadata.minor_version,
            file_size_bytes=file.num_bytes,
        )
        fragments.append(FragmentMetadata(id=number, files=[data_file], physical_rows=metadata.num_rows))
    return schema, fragments


def _join_schemas(schemas: Sequence[pa.Schema]) -> pa.Schema:
    import pyarrow as pa

    common = set.intersection(*(set(schema.names) for schema in schemas))
    fields = pa.unify_schemas(list(schemas))
    return pa.schema([field if field.name in common else field.with_nullable(True) for field in fields])


def _list_leaves(field: Any) -> Iterator[int]:
    children = field.children()
    if not children:
        yield field.id()
    for child in children:
        yield from _list_leaves(child)


class LanceDataFile:
    """The data file of one shard, and a batch of its rows in memory."""

    def __init__(self, run: Path, path: Path, work: Path) -> None:
        self._run, self._path, self._work = run, path, work
        self._folder = UnfinishedFolder(path, work=work)  # Lance's writer may have further files in it
        self._writer: Any = None
        self._schema: pa.Schema = None
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0  # of the images in `_rows`

    def add(self, sample: ExportSample, suffix: str) -> None:
        if self._writer is None:
            from lance.file import LanceFileWriter

            self._schema = build_schema(sample.columns)
            self._writer = LanceFileWriter(self._unfinished, self._schema, version=FILE_VERSION)
        self._rows.append({"image": sample.data, **sample.values})
        self._num_bytes += len(sample.data)
        if self._num_bytes >= BATCH_BYTES or len(self._rows) == BATCH_ROWS:
            self._flush()

    def commit(self) -> Mapping[str, int]:
        if self._writer is None:
            self._path.unlink(missing_ok=True)
            return {}
        self._flush()
        self._writer.close()
        with place_atomic(self._path, work=self._work) as unfinished:
            os.replace(self._unfinished, unfinished)
        self._folder.abandon()
        return {str(self._path.relative_to(self._run)): self._path.stat().st_size}

    def abandon(self) -> None:
        self._writer = None
        self._folder.abandon()

    @property
    def _unfinished(self) -> str:
        return str(self._folder.open() / self._path.name)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_batch(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._num_bytes = [], 0


def build_schema(columns: Sequence[str]) -> pa.Schema:
    """The image file, then these columns of `Exported`.

    Images are compressed already. Texts are compressed by zstd: Lance's own choice, FSST, draws samples at random.
    """
    import pyarrow as pa

    image = pa.field("image", pa.large_binary(), False, metadata={COMPRESSION: "none"})
    return pa.schema([image, *(_compress_texts(field) for field in arrow_schema(Exported) if field.name in columns)])


def _compress_texts(field: pa.Field) -> pa.Field:
    import pyarrow as pa

    if pa.types.is_list(field.type):
        return field.with_type(pa.list_(_compress_texts(field.type.value_field)))
    if pa.types.is_struct(field.type):
        return field.with_type(pa.struct([_compress_texts(child) for child in field.type]))
    return field.with_metadata({COMPRESSION: "zstd"}) if pa.types.is_string(field.type) else field
