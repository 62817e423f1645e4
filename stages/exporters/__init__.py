"""Export forms: the file layouts of a training set, one per file, named in `formats` of `[export]`.

The folder is the registry. A name with a dot is a module of your own. A form is a module with

- `open(run, shard, work) -> FormWriter`: the writer of one shard, where `run` is the run's folder, `shard` its number,
  and `work` the folder for unfinished files. Nothing is created before the first sample. A form that can be split has a
  further parameter, `split=""`, and writes the files of a split into `<run>/export/FORM/SPLIT/`;

and, if the dataset card is to describe it, `recap verify` is to compare its images with the rows, or its loaders need
a list of its files,

- `CARD`: a `CardEntry`;
- `read_images(path) -> Iterator[tuple[str, bytes]]`: the key and image file of each sample of a finished file;
- or `list_loose_files(path) -> Iterator[LooseFile]`, where a finished file lists files that `commit` does not return;
- `INDEXES`, names of files below `<run>/export/FORM/`, and `write_index(folder, files)`, which writes them into that
  folder, or into that of a split, from the `FormFile`s of the whole run, in order.

A form that copies no images has `NEEDS_IMAGES = False`; one that can name the corpus's files in their place, as
`ExportSample.reference` says, `REFERENCES_IMAGES = True`; one whose files follow those of the corpus, so that they
cannot be repartitioned, `DIVIDES = False`.

Files of a form belong in `<run>/export/FORM/`. A form knows nothing of how samples are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline import plugins
from pipeline.records import Exported, Image, Placed, column_names
from pipeline.storage import tables
from pipeline.storage.layout import work_folder
from pipeline.storage.payloads import file_extension


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The place of an image file."""

    image: Image  # its row, with the bytes' offset and number
    file: str  # path, as it is now, of the file that has the bytes
    name: str  # the plan's name for that file; relative to the run if ingest packed the image


@dataclass(frozen=True, kw_only=True)
class ExportSample:
    """A sample of the training set, with its image file."""

    row: Exported
    data: bytes  # the image file; empty when no form of the training set needs it
    reference: str = ""  # the path of the image file in the corpus, if images are not to be copied
    instruction: str = ""  # the user's turn, for forms with conversations
    split: str = ""  # the part of the training set that it belongs to; "": there is one part
    origin: Origin | None = None  # always given by the stage
    columns: tuple[str, ...] = column_names(Exported)  # of `row`, those that this training set has

    @property
    def id(self) -> tuple[str | int, ...]:
        return self.row.id

    @property
    def values(self) -> dict[str, Any]:
        """The training set's columns of the row, as JSON values."""
        values = vars(self.row)
        return {name: _plain(values[name]) for name in self.columns}

    @property
    def line(self) -> str:
        """The caption for text files, of which loaders read the first line, or each line as a caption of its own."""
        return join_lines(self.row.caption)


def _plain(value: Any) -> Any:
    return [vars(one) for one in value] if isinstance(value, tuple) else value


def join_lines(text: str) -> str:
    r"""The text on one line: white space around line breaks becomes one space.

    >>> join_lines("A red  square.\n\n It is large.\n"), join_lines("A red  square.")
    ('A red  square. It is large.', 'A red  square.')
    """
    lines = text.splitlines()
    return text if lines == [text] else " ".join(filter(None, map(str.strip, lines)))


@dataclass(frozen=True, kw_only=True)
class FormFile:
    """A finished file of a form."""

    name: str  # below export/FORM/, or export/FORM/SPLIT/
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CardEntry:
    """The dataset card's words about a form."""

    image: str  # the name of the image in a sample: a column, or the extension of a member
    caption: str  # the same of the caption
    data_files: str = ""  # glob below export/ that the Hub's viewer loads; "": none
    files: str = ""  # the same for other files


class FormWriter(Protocol):
    """Writes the samples of one shard in one form."""

    def add(self, sample: ExportSample, suffix: str) -> None:
        """Appends a sample; `suffix` is the file extension of its image, without a dot."""

    def commit(self) -> Mapping[str, int]:
        """Moves the finished files into place; returns path within the run -> size in bytes."""

    def abandon(self) -> None:
        """Removes unfinished files."""


def put_text(path: Path, text: str) -> None:
    """Writes a file, unless it has that text."""
    if not path.exists() or path.read_bytes() != text.encode():
        with tables.open_atomic(path) as file:
            file.write(text.encode())


class ExportPayload:
    """The files that a shard writes: its samples in each of the forms.

    These are one file or folder of each form and split. Samples of a repartitioned training set name
    their file; they come file by file, and each file is committed when the next begins.

    Args:
        splits: of the training set; None: it is repartitioned.
    """

    def __init__(
        self,
        run: Path,
        shard: int,
        *,
        formats: Sequence[str],
        image_extension: str,
        splits: Iterable[str] | None = ("",),
    ) -> None:
        self._run, self._extension, self._shard = run, image_extension, shard
        self._forms = [plugins.load("stages.exporters", name) for name in formats]
        self._sizes: dict[str, int] = {}
        self._is_divided = splits is None
        files = [(split, shard) for split in splits or ()]
        self._writers: dict[tuple[str, int], list[FormWriter]] = {file: self._open(*file) for file in files}

    def take(self, output: ExportSample) -> Exported:
        suffix = file_extension(output.row.format) if self._extension == "original" else self._extension
        for writer in self._find_writers(output):
            writer.add(output, suffix)
        return output.row

    def _find_writers(self, output: ExportSample) -> list[FormWriter]:
        number = output.row.number if isinstance(output.row, Placed) else self._shard
        file = output.split, number
        if self._is_divided and file not in self._writers:
            self.commit()
            self._writers[file] = self._open(*file)
        return self._writers[file]

    def _open(self, split: str, number: int) -> list[FormWriter]:
        work = work_folder(self._run, "export/index", self._shard)
        return [form.open(self._run, number, work, *([split] if split else [])) for form in self._forms]

    def commit(self) -> Mapping[str, int]:
        for writers in self._writers.values():
            for writer in writers:
                self._sizes |= writer.commit()
        self._writers.clear()
        return self._sizes

    def abandon(self) -> None:
        for writers in self._writers.values():
            for writer in writers:
                writer.abandon()
