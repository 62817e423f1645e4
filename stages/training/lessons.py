"""Decides what a lesson is: an image with questions and the answers to be learnt, read from the tables of a run.

It refuses to know where answers come from: a teacher's captions and a judge's verdicts are tables like all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import images, tables
from pipeline.config import Run
from pipeline.plan import Plan
from pipeline.records import Caption, Criterion, Image, Score
from pipeline.shard import Shard
from stages import recipes, rubrics
from stages.sentences import sentences
from stages.training.settings import Config

if TYPE_CHECKING:
    import datasets
    import torch

T = TypeVar("T")
IGNORED = -100  # a label that is not learnt
MAX_PIXELS = 1280 * 28 * 28  # of a picture, as the engines have it by default


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An image with questions about it and their answers."""

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


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """How the model sizes pictures: as the engines do it, by the processor's own numbers."""

    max_pixels: int
    factor: int
    min_pixels: int

    @classmethod
    def of(cls, processor: Any) -> PixelRule:
        own = processor.image_processor
        return cls(
            max_pixels=min(own.size["longest_edge"], MAX_PIXELS),
            factor=own.patch_size * own.merge_size,
            min_pixels=own.size["shortest_edge"],
        )


class Collator:
    """Turns lessons into a batch of tensors; only answers are labels."""

    def __init__(self, processor: Any, *, regions: bool = False) -> None:
        self._processor, self._regions = processor, regions
        self._rule = PixelRule.of(processor)

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
            from stages.training.regions import answers_of

            names = [lesson["source_key"] for lesson in lessons]
            batch["regions"] = answers_of(
                names, pixels["image_grid_thw"], merge=self._processor.image_processor.merge_size
            )
        return batch

    def picture(self, lesson: Mapping[str, Any]) -> Any:
        """As the engines show it."""
        rule = self._rule
        return images.pixels(
            self.data(lesson), max_pixels=rule.max_pixels, factor=rule.factor, min_pixels=rule.min_pixels
        )

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


def arranged(sizes: Sequence[int], *, num_batches: int, batch_size: int, seed: int) -> list[int]:
    """The order of lessons for a whole training, epoch after epoch: each batch has images of one size.

    It follows from its arguments alone, so that a training which was killed goes on with the same lessons.

    >>> arranged([1, 2, 1, 2], num_batches=2, batch_size=2, seed=0) in ([0, 2, 1, 3], [2, 0, 1, 3], [0, 2, 3, 1])
    True
    """
    rng = Random(f"order/{seed}")
    waiting: dict[int, list[int]] = {}
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        order = list(range(len(sizes)))
        rng.shuffle(order)
        for lesson in order:
            batch = waiting.setdefault(sizes[lesson], [])
            batch.append(lesson)
            if len(batch) == batch_size:
                batches.append(waiting.pop(sizes[lesson]))
    return [lesson for batch in batches[:num_batches] for lesson in batch]


def dataset(taught: Sequence[Lesson], order: Sequence[int]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_list([asdict(lesson) for lesson in taught]).select(order)


def in_order(
    taught: Sequence[Lesson],
    processor: Any,
    *,
    alike: bool,
    per_batch: int = 1,
    seed: int = 0,
    num_batches: int | None = None,
) -> list[int]:
    """The order of the lessons of so many batches; without `num_batches` every one once, by size.

    Args:
        alike: a batch has images of one size, which is faster on a CPU; rare sizes may wait for long.
    """
    rule = PixelRule.of(processor)
    sizes = [_num_pixels(lesson, rule) if alike else 0 for lesson in taught]
    if num_batches is None:
        return sorted(range(len(taught)), key=lambda number: sizes[number])
    return arranged(sizes, num_batches=num_batches, batch_size=per_batch, seed=seed)


def _num_pixels(lesson: Lesson, rule: PixelRule) -> int:
    """Of the picture as the model sees it."""
    width, height = images.target_size(
        lesson.width, lesson.height, max_pixels=rule.max_pixels, factor=rule.factor, min_pixels=rule.min_pixels
    )
    return width * height


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about an image with the answer to be learnt."""

    key: str
    system: str
    question: str
    answer: str


def lessons(run: Run, config: Config) -> Iterator[Lesson]:
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
                for turns in batched(group, config.turns):
                    yield _lesson(shown[image_key], turns)


def _images(run: Run) -> Iterator[tuple[Path, Iterator[Image]]]:
    """Each table of images, and what is usable in it, with the files where they lie now."""
    plan, _ = Plan.load(run.folder / "plan.parquet")
    for file in sorted((run.folder / "image").glob("*.parquet")):
        shard = Shard(run=run, plan=plan, number=int(file.stem))
        yield file, _usable(shard, file)


def _usable(shard: Shard, table: Path) -> Iterator[Image]:
    place = cache(shard.place)
    for image in tables.read(table, Image):
        if image.status == "ok" and image.file is not None:
            yield replace(image, file=str(place(image.file)))


def _lesson(image: Image, turns: Sequence[Asked]) -> Lesson:
    assert image.file is not None and image.offset is not None and image.num_bytes is not None
    assert image.width is not None and image.height is not None and image.sha256 is not None
    return Lesson(
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


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Runs of `size` items, the last one shorter."""
    rest = iter(items)
    while run := tuple(islice(rest, size)):
        yield run


def _texts(run: Run, config: Config, name: str, file: str) -> Iterator[Asked]:
    """Every good caption, as the answer to what its recipe asks."""
    recipe = recipes.load(config.recipe or run.sections["caption"][name].recipe, run=run.folder)
    alt_texts = {image.key: image.alt_text for image in tables.read(run.folder / "image" / file, Image)}
    for caption in _captions(run, name, file):
        question = recipe.ask(alt_texts[caption.key]).prompt
        yield Asked(
            key=caption.key,
            system=recipe.words.system,
            question=question,
            answer=caption.fields or caption.text,
        )


def _question(run: Run, config: Config) -> Callable[[Image], Asked]:
    """What is asked about an image, with no answer."""
    recipe = recipes.load(config.recipe or run.sections["caption"][config.captions[0]].recipe, run=run.folder)

    def asked(image: Image) -> Asked:
        question = recipe.ask(image.alt_text).prompt
        return Asked(key=image.key, system=recipe.words.system, question=question, answer="")

    return asked


def _verdicts(run: Run, config: Config, name: str, file: str) -> Iterator[Asked]:
    """Every verdict of the score pass, as the answer to what its rubric asks."""
    rubric = rubrics.load(run.sections["score"][config.scores].scorer.config.rubric, run=run.folder)
    alt_texts = {image.key: image.alt_text for image in tables.read(run.folder / "image" / file, Image)}
    captions = {caption.id: caption for caption in _captions(run, name, file)}
    for score in tables.read(run.folder / "score" / config.scores / name / file, Score):
        if score.status != "ok":
            continue
        text = captions[score.key, score.candidate].text
        parts = sentences(text) if rubric.words.unit == "sentence" else [text]
        for part, criteria in zip(parts, batched(score.criteria, len(rubric.criteria)), strict=True):
            if all(criterion.verdict is not None for criterion in criteria):
                question = rubric.ask(caption=text, sentence=part, alt_text=alt_texts[score.key])
                yield Asked(
                    key=score.key, system=rubric.words.system, question=question, answer=_answer(rubric, criteria)
                )


def _answer(rubric: rubrics.Rubric, criteria: Sequence[Criterion]) -> str:
    """The JSON by which a judge would have given these verdicts."""
    said = [{"reason": criterion.reason or "", "verdict": criterion.verdict} for criterion in criteria]
    return json.dumps(said[0] if len(said) == 1 else dict(zip(rubric.criteria, said, strict=True)), ensure_ascii=False)


def _captions(run: Run, name: str, file: str) -> Iterator[Caption]:
    return (row for row in tables.read(run.folder / "caption" / name / file, Caption) if row.status == "ok")


def held_out(taught: Sequence[Lesson], *, num_images: int) -> tuple[list[Lesson], list[Lesson]]:
    """Lessons to learn and lessons to measure on; copies of one picture are on one side."""
    chosen = set(sorted({lesson.sha256 for lesson in taught})[:num_images])
    return (
        [lesson for lesson in taught if lesson.sha256 not in chosen],
        [lesson for lesson in taught if lesson.sha256 in chosen],
    )
