"""Decides what a lesson is: an image with questions and the answers to be learnt, read from the tables of a run.

It refuses to know where answers come from: a teacher's captions and a judge's verdicts are tables like all others.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.decoding import images
from pipeline.execution.passes import Shard
from pipeline.records import Caption, Criterion, Image, ImageRubric, Record, RubricCriterion, Score, arrow_schema
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.plan import Plan
from pipeline.storage.tables import split_batches
from stages import recipes, rubrics
from stages.text.sentences import split_sentences
from stages.training.settings import Config

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa
    import torch

    Numbers = np.ndarray[Any, np.dtype[np.int64]]  # of lessons, from 0
    Digests = np.ndarray[Any, np.dtype[np.uint64]]  # the first 64 bits: enough to tell millions of pictures apart

IGNORED = -100  # a label that is not learnt


@dataclass(frozen=True, kw_only=True)
class TrainExample(Record):
    """An image with questions about it and their answers."""

    table: ClassVar[str] = "lesson"

    key: str
    source_key: str
    alt_text: str | None
    sha256: str
    file: str  # the tar that holds the image, where it lies now
    offset: int
    num_bytes: int
    width: int
    height: int
    system: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


class Collator:
    """Turns lessons into a batch of tensors; only answers are labels."""

    def __init__(self, processor: Any, *, regions: bool = False) -> None:
        self._processor, self._regions = processor, regions
        self._rule = images.PixelRule.from_processor(processor)

    def __call__(self, lessons: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        images = [self.picture(lesson) for lesson in lessons]
        pixels = self._processor.image_processor(images=images, return_tensors="pt")
        sizes = [int(grid.prod()) // self._processor.image_processor.merge_size**2 for grid in pixels["image_grid_thw"]]
        rows = [self._tokens(lesson, size) for lesson, size in zip(lessons, sizes, strict=True)]
        longest = max(len(ids) for ids, _ in rows)
        pad = self._processor.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
            "mm_token_type_ids": (ids == self._processor.image_token_id).long(),
            **pixels,
        }
        if self._regions:
            from stages.scenes.region_head import label_batch

            names = [lesson["source_key"] for lesson in lessons]
            batch["regions"] = label_batch(
                names, pixels["image_grid_thw"], merge=self._processor.image_processor.merge_size
            )
        return batch

    def picture(self, lesson: Mapping[str, Any]) -> Any:
        """As the engines show it."""
        return images.decode_pixels(self.data(lesson), self._rule)

    def data(self, lesson: Mapping[str, Any]) -> bytes:
        with open(lesson["file"], "rb") as file:
            return os.pread(file.fileno(), lesson["num_bytes"], lesson["offset"])

    def _tokens(self, lesson: Mapping[str, Any], num_image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids and labels: the conversation so far is never a label, an answer with its end always is."""
        tokenizer = self._processor.tokenizer
        ids: list[int] = []
        labels: list[int] = []
        told = lesson["system"]
        messages: list[dict[str, Any]] = (
            [{"role": "system", "content": [{"type": "text", "text": told}]}] if told else []
        )
        asked = ""
        for turn, (question, answer) in enumerate(zip(lesson["questions"], lesson["answers"], strict=True)):
            shown = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
            prompt = self._processor.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            told = self._processor.apply_chat_template(messages)
            for text, learnt in ((prompt[len(asked) :], False), (told[len(prompt) :], True)):
                new = tokenizer(text, add_special_tokens=False).input_ids
                new = self._expanded(new, num_image_tokens)
                ids += new
                labels += new if learnt else [IGNORED] * len(new)
            asked = told
        return ids, labels

    def _expanded(self, ids: list[int], num_image_tokens: int) -> list[int]:
        image = self._processor.image_token_id
        return [one for i in ids for one in ([i] * num_image_tokens if i == image else [i])]


def arranged(sizes: Sequence[int] | Numbers, *, num_batches: int, batch_size: int, seed: int) -> array[int]:
    """The order of lessons for a whole training, epoch after epoch: each batch has images of one size.

    It follows from its arguments alone, so that a training which was killed goes on with the same lessons.

    >>> order = arranged([1, 2, 1, 2], num_batches=2, batch_size=2, seed=0)
    >>> list(order) in ([0, 2, 1, 3], [2, 0, 1, 3], [0, 2, 3, 1])
    True
    """
    rng = Random(f"order/{seed}")
    waiting: dict[int, list[int]] = {}
    taken = array("q")
    while len(taken) < num_batches * batch_size:
        order = array("q", range(len(sizes)))
        rng.shuffle(order)
        for lesson in order:
            batch = waiting.setdefault(sizes[lesson], [])
            batch.append(lesson)
            if len(batch) == batch_size:
                taken.extend(waiting.pop(sizes[lesson]))
    return taken[: num_batches * batch_size]


def in_order(
    taught: datasets.Dataset,
    numbers: Numbers,
    processor: Any,
    *,
    alike: bool,
    per_batch: int = 1,
    seed: int = 0,
    num_batches: int | None = None,
) -> Numbers:
    """The lessons of so many batches, of those that have these numbers; without `num_batches` every one once, by size.

    Args:
        alike: a batch has images of one size, which is faster on a CPU; rare sizes may wait for long.
    """
    import numpy as np

    sizes = (
        _sizes(taught, images.PixelRule.from_processor(processor))[numbers]
        if alike
        else np.zeros(len(numbers), np.int64)
    )
    if num_batches is None:
        order: Numbers = np.argsort(sizes, kind="stable")
    else:
        order = np.asarray(arranged(sizes, num_batches=num_batches, batch_size=per_batch, seed=seed))
    return numbers[order]


def _sizes(taught: datasets.Dataset, rule: images.PixelRule) -> Numbers:
    """The pixels of each lesson's picture as the model sees it."""
    import numpy as np

    @lru_cache
    def size(width: int, height: int) -> int:
        width, height = rule.target_size(width, height)
        return width * height

    columns = zip(*(_values(taught, name) for name in ("width", "height")), strict=True)
    return np.fromiter((size(*one) for one in columns), np.int64, len(taught))


def digests(taught: datasets.Dataset) -> Digests:
    """Of each lesson's image."""
    import numpy as np

    return np.fromiter((int(sha256[:16], 16) for sha256 in _values(taught, "sha256")), np.uint64, len(taught))


def _values(taught: datasets.Dataset, column: str) -> Iterator[Any]:
    for chunk in taught.data.column(column).chunks:
        yield from chunk.to_pylist()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about an image with the answer to be learnt."""

    key: str
    system: str
    question: str
    answer: str


def lessons(run: Run, config: Config) -> Iterator[TrainExample]:
    """What the tables of the run teach, in key order."""
    if config.method != "sft":
        question = _question(run, config) if config.method == "grpo" else None
        for _, found in _images(run):
            for image in found:
                yield _lesson(image, () if question is None else (question(image),))
        return
    read = _verdicts if config.scores else _texts
    for file, found in _images(run):
        shown = {image.key: image for image in found}
        for name in config.captions:
            for image_key, group in groupby(read(run, config, name, file.name), key=lambda asked: asked.key):
                for turns in split_batches(group, config.turns):
                    yield _lesson(shown[image_key], turns)


def _images(run: Run) -> Iterator[tuple[Path, Iterator[Image]]]:
    """Each table of images, and what is usable in it, with the files where they lie now."""
    plan, _ = Plan.load(run.folder / "plan.parquet")
    for file in sorted((run.folder / "image").glob("*.parquet")):
        shard = Shard(run=run, number=int(file.stem), pieces=plan.pieces(int(file.stem)))
        yield file, _usable(shard, file)


def _usable(shard: Shard, table: Path) -> Iterator[Image]:
    place = cache(shard.locate)
    for image in tables.read_rows(table, Image):
        if image.status == "ok" and image.file is not None:
            yield replace(image, file=str(place(image.file)))


def _lesson(image: Image, turns: Sequence[Asked]) -> TrainExample:
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
        questions=tuple(asked.question for asked in turns),
        answers=tuple(asked.answer for asked in turns),
    )


def _texts(run: Run, config: Config, name: str, file: str) -> Iterator[Asked]:
    """Every good caption, as the answer to what its recipe asks."""
    recipe = recipe_of(run, config, name)
    alt_texts = {image.key: image.alt_text for image in tables.read_rows(run.folder / "image" / file, Image)}
    for caption in _captions(run, name, file):
        question = recipe.build_prompt(alt_texts[caption.key]).prompt
        yield Asked(
            key=caption.key,
            system=recipe.spec.system,
            question=question,
            answer=caption.fields or caption.text,
        )


def recipe_of(run: Run, config: Config, name: str) -> recipes.Recipe:
    """What is asked of who learns from this caption pass."""
    return recipes.load(config.recipe or run.sections["caption"][name].recipe, run=run.folder)


def _question(run: Run, config: Config) -> Callable[[Image], Asked]:
    """What is asked about an image, with no answer."""
    recipe = recipe_of(run, config, config.captions[0])

    def asked(image: Image) -> Asked:
        question = recipe.build_prompt(image.alt_text).prompt
        return Asked(key=image.key, system=recipe.spec.system, question=question, answer="")

    return asked


def _verdicts(run: Run, config: Config, name: str, file: str) -> Iterator[Asked]:
    """Every verdict of the score pass, as the answer to what its rubric asks."""
    rubric = rubrics.load(run.sections["score"][config.scores].scorer.config.rubric, run=run.folder)
    alt_texts = {image.key: image.alt_text for image in tables.read_rows(run.folder / "image" / file, Image)}
    captions = {caption.id: caption for caption in _captions(run, name, file)}
    for score in tables.read_rows(run.folder / "score" / config.scores / name / file, Score):
        if score.status != "ok":
            continue
        text = captions[score.key, score.candidate].text
        parts = split_sentences(text) if rubric.spec.unit == "sentence" else [text]
        for part, criteria in zip(parts, split_batches(score.criteria, len(rubric.criteria)), strict=True):
            if all(criterion.verdict is not None for criterion in criteria):
                question = rubric.build_prompt(caption=text, sentence=part, alt_text=alt_texts[score.key])
                yield Asked(
                    key=score.key, system=rubric.spec.system, question=question, answer=_answer(rubric, criteria)
                )


def _answer(rubric: rubrics.Rubric, criteria: Sequence[Criterion]) -> str:
    """The JSON by which a judge would have given these verdicts."""
    said = [{"reason": criterion.reason or "", "verdict": criterion.verdict} for criterion in criteria]
    return json.dumps(said[0] if len(said) == 1 else dict(zip(rubric.criteria, said, strict=True)), ensure_ascii=False)


def _captions(run: Run, name: str, file: str) -> Iterator[Caption]:
    return (row for row in tables.read_rows(run.folder / "caption" / name / file, Caption) if row.status == "ok")


def held_out(pictures: Digests, *, num_images: int) -> tuple[Numbers, Numbers]:
    """The numbers of lessons to learn and to measure on, from their digests; copies of one picture are on one side."""
    import numpy as np

    measured = np.isin(pictures, np.unique(pictures)[:num_images])
    return np.flatnonzero(~measured), np.flatnonzero(measured)


KEPT_RUBRICS = 32  # unpacked, for the answers of one group are held against one rubric


def on_disk(path: Path, rows: Iterable[Record], record: type[Record]) -> datasets.Dataset:
    """The rows in their order, as trainers take them."""
    import datasets

    batches = (tables.to_arrow(record, some) for some in tables.split_batches(rows, tables.ROWS_PER_GROUP))
    _write(path, arrow_schema(record), batches)
    return datasets.Dataset.from_file(str(path))


class Rubrics(Mapping[str, tuple[RubricCriterion, ...]]):
    """The criteria of every image that has some, by its key. Memory has the keys."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        import numpy as np
        import pyarrow as pa

        part = pa.schema([arrow_schema(ImageRubric).field("key"), arrow_schema(ImageRubric).field("criteria")])
        _write(path, part, _with_criteria(files, part.names))
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        chunks = [np.array(chunk.to_pylist(), "S") for chunk in table["key"].chunks]
        keys = np.concatenate([np.array([], "S1"), *chunks])
        self._rows = np.argsort(keys)
        self._keys = keys[self._rows]
        self._criteria = lru_cache(KEPT_RUBRICS)(
            lambda row: tuple(RubricCriterion(**one) for one in table["criteria"][row].as_py())
        )

    def __getitem__(self, key: str) -> tuple[RubricCriterion, ...]:
        if key not in self:
            raise KeyError(key)
        criteria: tuple[RubricCriterion, ...] = self._criteria(int(self._rows[self._place(key)]))
        return criteria

    def __contains__(self, key: object) -> bool:
        place = self._place(str(key))
        return place < len(self) and bool(self._keys[place] == str(key).encode())

    def _place(self, key: str) -> int:
        return int(self._keys.searchsorted(key.encode()))

    def __iter__(self) -> Iterator[str]:
        return (key.decode() for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _with_criteria(files: Iterable[Path], names: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc

    for file in files:
        for batch in tables.read_batches(file, ImageRubric):
            yield batch.filter(pc.equal(batch["status"], "ok")).select(names)


def _write(path: Path, columns: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    import pyarrow as pa

    with tables.open_atomic(path, durable=False) as file, pa.ipc.new_stream(file, columns) as writer:
        for batch in batches:
            writer.write_batch(batch)
