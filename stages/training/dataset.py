"""Training examples: images with questions and answers, read from a run's tables and kept on disk.

It refuses to know where answers come from: a teacher's captions and a judge's verdicts are tables like all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.execution.passes import Shard
from pipeline.records import Image, Record, arrow_schema
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.plan import Plan
from stages.text.given import Texts

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

NO_TEXTS: Mapping[str, Texts] = {}


@dataclass(frozen=True, kw_only=True)
class TrainExample(Record):
    """An image with questions about it and their answers."""

    table: ClassVar[str] = "example"

    key: str
    source_key: str
    alt_text: str | None
    sha256: str
    file: str  # the present path of the image, or of the tar that holds it
    offset: int
    num_bytes: int
    width: int
    height: int
    system: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    texts: str = "{}"  # JSON by reward: what `given` of its section has about the image
    shows_image: bool = True  # whether the model sees the image, or the questions alone


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question about an image, with the answer to learn."""

    key: str
    system: str
    question: str
    answer: str


def read_images(run: Run) -> Iterator[tuple[Path, Iterator[Image]]]:
    """Each image table with its usable images, whose `file` is the present path."""
    plan, _ = Plan.load(run.folder / "plan.parquet")
    for file in sorted((run.folder / "image").glob("*.parquet")):
        number = int(file.stem)
        yield file, _read_usable_images(Shard(run=run, number=number, pieces=plan.pieces(number)), file)


def _read_usable_images(shard: Shard, table: Path) -> Iterator[Image]:
    for image in tables.read_rows(table, Image):
        if image.status == "ok" and image.file is not None:
            yield replace(image, file=str(shard.locate(image)))


def make_example(
    image: Image, turns: Sequence[Turn], *, shows_image: bool = True, texts: Mapping[str, Texts] = NO_TEXTS
) -> TrainExample:
    assert image.file is not None and image.offset is not None and image.num_bytes is not None
    assert image.width is not None and image.height is not None and image.sha256 is not None
    return TrainExample(
        key=image.key,
        alt_text=image.alt_text,
        source_key=image.source_key,
        sha256=image.sha256,
        file=image.file,
        offset=image.offset,
        num_bytes=image.num_bytes,
        width=image.width,
        height=image.height,
        system=turns[0].system if turns else "",
        questions=tuple(turn.question for turn in turns),
        answers=tuple(turn.answer for turn in turns),
        texts=json.dumps(texts, ensure_ascii=False),
        shows_image=shows_image,
    )


def read_image_file(example: Mapping[str, Any]) -> bytes:
    """The bytes of an example's image file; `example` is a row as a dict."""
    with open(example["file"], "rb") as file:
        return os.pread(file.fileno(), example["num_bytes"], example["offset"])


def write_dataset(path: Path, examples: Iterable[TrainExample]) -> datasets.Dataset:
    """Writes the examples to an Arrow file, which the dataset maps into memory."""
    import datasets

    batches = (tables.to_arrow(TrainExample, rows) for rows in tables.split_batches(examples, tables.ROWS_PER_GROUP))
    write_arrow(path, arrow_schema(TrainExample), batches)
    return datasets.Dataset.from_file(str(path))


def write_arrow(path: Path, columns: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    import pyarrow as pa

    with tables.open_atomic(path, durable=False) as file, pa.ipc.new_stream(file, columns) as writer:
        for batch in batches:
            writer.write_batch(batch)
