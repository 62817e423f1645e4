"""Decides how a captioner or a judge is trained from the tables of a run.

A lesson is an image with questions and the answers to be learnt. It refuses to know where the answers come from: a
teacher's captions and a judge's verdicts are tables like all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pipeline import images, tables
from pipeline.config import Run, key, stamped
from pipeline.errors import UserError
from pipeline.passes import Pass
from pipeline.records import Caption, Criterion, Image, Record, Score
from pipeline.terminal import say
from stages import recipes, rubrics
from stages.sentences import sentences

if TYPE_CHECKING:
    import datasets
    import torch

T = TypeVar("T")
IGNORED = -100  # a label that is not learnt
VERSION = 1
MAX_PIXELS = 1280 * 28 * 28  # of a picture, as the engines have it by default
TOLD = ("loss", "mean_token_accuracy", "eval_loss", "eval_mean_token_accuracy")  # in messages
READER = "region_reader"  # the part of the model that is thrown away in the end


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[train]`."""

    method: Literal["sft", "regions"] = key(
        "sft", "sft: learn the answers word by word; regions: the vision tower alone, on labelled scenes"
    )
    model: str = key("new", "a model's folder or name on the Hub; new: a small Qwen2.5-VL, untrained", locate="model")
    output: str = key("model", "the folder in the run that the trained model is written to", stamp=False)
    captions: tuple[str, ...] = key(("main",), "caption passes whose texts, or whose scores, are learnt")
    recipe: str = key("", "what the model is asked; empty: what the captions' own pass asked")
    scores: str = key("", "a score pass by a judge: its verdicts are learnt; empty: the captions' texts are")
    turns: int = key(1, "questions about one image in one lesson", least=1)
    regions: float = key(0.0, "sft: weight of naming what lies under each image token besides", least=0)
    steps: int = key(1000, "steps of the optimizer", least=1)
    batch_size: int = key(64, "lessons in a step on one device", least=1)
    accumulate: int = key(1, "batches in a step", least=1)
    learning_rate: float = key(1e-5, "its peak", least=0)
    warmup_steps: int = key(20, "steps until the peak", least=0)
    decay: Literal["linear", "cosine", "constant"] = key("cosine", "how it falls after the peak")
    weight_decay: float = key(0.01, "pull towards zero", least=0)
    optimizer: Literal["adamw", "masters"] = key(
        "adamw", "masters: weights in 16 bits stepped on 32-bit copies, matrices by Muon: for small models on a CPU"
    )
    muon: float = key(16.0, "its learning rate over the others' (masters only); 0: matrices by AdamW too", least=0)
    freeze_vision: bool = key(False, "leave the vision tower as it is")
    precision: Literal["float32", "bfloat16"] = key("float32", "of the computation")
    eval_images: int = key(256, "images held out of training, to measure on", least=0)
    eval_steps: int = key(100, "steps between measurements", least=1, stamp=False)
    log_steps: int = key(20, "steps between points of the curve", least=1, stamp=False)
    save_steps: int = key(100, "steps between checkpoints", least=1, stamp=False)
    compile: bool = key(
        False, "compile the layers (masters on a CPU only): a slower start, then a third faster", stamp=False
    )
    seed: int = key(0, "of the order of lessons and of new weights", least=0)
    num_workers: int = key(1, "processes that prepare lessons", least=0, stamp=False)

    @property
    def sees(self) -> bool:
        """Whether regions are learnt, alone or besides."""
        return self.method == "regions" or self.regions > 0


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An image with questions about it and their answers."""

    source_key: str
    sha256: str
    file: str  # the tar that holds the image
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

    def __init__(self, processor: Any, *, folder: Path, regions: bool = False) -> None:
        self._processor, self._folder, self._regions = processor, folder, regions
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
            from stages._regions import answers_of

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
        with open(self._folder / lesson["file"], "rb") as file:
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


# The training


def passes(_: Run) -> Iterable[Pass]:
    """None: a model is made from all shards at once, not shard by shard."""
    return ()


def train(run: Run) -> Path:
    """Trains what `[train]` says and returns the model's folder. A training that was killed goes on where it was saved.

    Raises:
        UserError: there is nothing to learn from.
    """
    config: Config = run.sections["train"][""]
    work, output = run.folder / "train", run.folder / config.output
    model, processor = _start(config)
    learnt, measured = held_out(list(lessons(run, config)), num_images=config.eval_images)
    if not learnt:
        raise UserError(f"{run.file}: train: {', '.join(config.captions)} taught nothing: make them first")
    order = _arranged(learnt, config, processor, num_batches=config.steps * config.accumulate)
    made = trainer(
        config,
        model=model,
        processor=processor,
        collator=Collator(processor, folder=run.folder, regions=config.sees),
        learnt=_dataset(learnt, order),
        measured=_dataset(measured, _arranged(measured, config, processor)) if measured else None,
        folder=work,
        curve=Curve(run.folder, config),
    )
    made.train(resume_from_checkpoint=_last_checkpoint(work))
    _save(made, processor, output)
    (output / "README.md").write_text(card(run, config, made.state.log_history, num_lessons=len(learnt)))
    return output


def trainer(
    config: Config,
    *,
    model: Any,
    processor: Any,
    collator: Collator,
    learnt: datasets.Dataset,
    measured: datasets.Dataset | None,
    folder: Path,
    curve: Curve | None = None,
) -> Any:
    """TRL's trainer, for lessons that are already in order."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            regions = inputs.pop("regions", None)
            if config.method == "regions":
                return self._regions_loss(inputs, regions)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if regions is None:
                return loss
            named = self.model.region_reader.loss(regions)
            self._metrics["train" if model.training else "eval"]["regions_loss"].append(named.item())
            return loss + config.regions * named if model.training else loss

        def _regions_loss(self, inputs: dict[str, Any], regions: torch.Tensor) -> torch.Tensor:
            pixels = inputs["pixel_values"].to(self.model.dtype)
            self.model.model.visual(pixels, grid_thw=inputs["image_grid_thw"])
            loss: torch.Tensor = self.model.region_reader.loss(regions)
            return loss

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            """By the names that the model itself saves under: the trainer's own way finds none of a Qwen2.5-VL's."""
            _reload(self.model if model is None else model, Path(folder))

    class Keeper(TrainerCallback):  # type: ignore[misc]
        def on_save(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            if curve is not None:
                curve.write(state.log_history)

        on_train_end = on_save

        def on_log(
            self, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any
        ) -> None:
            shown = {name: float(value) for name, value in (logs or {}).items() if name in TOLD}
            if shown:
                told = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
                say(f"train: step {state.global_step}/{config.steps}, {told}")

    args = SFTConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.decay,
        weight_decay=config.weight_decay,
        bf16=config.precision == "bfloat16" and config.optimizer == "adamw",
        use_cpu=not _has_gpu(),
        eval_strategy="steps" if measured is not None else "no",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        seed=config.seed,
        gradient_checkpointing=False,
        max_length=None,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=config.num_workers,
        dataloader_prefetch_factor=4 if config.num_workers else None,
        dataloader_persistent_workers=config.num_workers > 0,
        disable_tqdm=True,
        report_to="none",
    )
    if config.sees:
        from stages._regions import Reader

        # as a part of the model, so that its weights are stepped and kept with the others
        model.add_module(
            "region_reader", Reader(model.model.visual, model.config.text_config.hidden_size).to(model.dtype)
        )
    made = Trainer(
        model=model,
        args=args,
        processing_class=processor,
        data_collator=collator,
        train_dataset=learnt,
        eval_dataset=measured,
        optimizers=(_optimizer(config, model), None),
        callbacks=[Keeper()],
    )
    made.remove_callback(PrinterCallback)  # it writes to stdout, where only data goes
    return made


def _optimizer(config: Config, model: Any) -> Any:
    """None: the trainer's own AdamW."""
    if config.optimizer == "adamw":
        return None
    from stages._masters import Masters

    return Masters(model, lr=config.learning_rate, weight_decay=config.weight_decay, muon=config.muon)


def _start(config: Config) -> tuple[Any, Any]:
    """The model to begin with, and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from stages import _small

    torch.manual_seed(config.seed)
    if config.model == "new":
        processor = _small.new_processor()
        model: Any = _small.new_model(processor)
    else:
        processor = AutoProcessor.from_pretrained(str(config.model))
        model = AutoModelForImageTextToText.from_pretrained(str(config.model), dtype=torch.float32)
    if config.optimizer == "masters":
        model = model.bfloat16()
        if not _has_gpu():
            _small.quicken(model, compiled=config.compile)
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model, processor


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the trainer writes its state last."""
    found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return str(found[-1].parent) if found else None


def _reload(model: Any, folder: Path) -> None:
    """The weights of a checkpoint, those of the region reader too.

    Raises:
        RuntimeError: the checkpoint lacks some.
    """
    from safetensors.torch import load_file

    saved = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    for file in folder.glob("*.safetensors"):
        saved |= {name: value for name, value in load_file(file).items() if name.startswith(READER)}
    model.load_state_dict(saved)


def _save(made: Any, processor: Any, output: Path) -> None:
    """The model alone, as transformers and vLLM load it."""
    if hasattr(made.model, READER):
        delattr(made.model, READER)
    made.model.config.use_cache = True  # the trainer turned it off
    made.model.save_pretrained(output)
    processor.save_pretrained(output)


# What is kept of a training


@dataclass(frozen=True, kw_only=True)
class Step(Record):
    """One point of a learning curve."""

    table: ClassVar[str] = "step"

    step: int
    name: str  # loss, eval_loss, learning_rate, ...
    value: float

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.step, self.name)


class Curve:
    """Writes `step/00000.parquet` anew at each checkpoint: all points so far, those from before a kill included."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._path = folder / "step" / "00000.parquet"
        self._recipe = tables.Recipe(stage="train", name="", version=VERSION, slice=stamped(config), inputs={})

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        tables.write(self._path, Step, points(log), self._recipe)


def points(log: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The trainer's log as points, in order, each once."""
    found = {
        (int(entry["step"]), name): float(value)
        for entry in log
        for name, value in entry.items()
        if name not in ("step", "epoch")
    }
    return [Step(step=step, name=name, value=value) for (step, name), value in sorted(found.items())]


def card(run: Run, config: Config, log: Sequence[Mapping[str, Any]], *, num_lessons: int) -> str:
    """The model's README.md: what it learnt from, how, and how far it got."""
    last = {name: value for entry in log for name, value in entry.items() if name.startswith("eval_")}
    figures = "".join(
        f"| {name.removeprefix('eval_').replace('_', ' ')} | {last[name]:.4g} |\n"
        for name in ("eval_loss", "eval_mean_token_accuracy", "eval_regions_loss")
        if name in last
    )
    settings = "".join(f"| {name} | `{value}` |\n" for name, value in stamped(config).items())
    return CARD.format(
        name=config.output,
        learnt=config.scores or "the texts",
        captions=", ".join(config.captions),
        source=run.source.kind,
        num_lessons=num_lessons,
        samples=config.steps * config.accumulate * config.batch_size,
        figures=figures,
        settings=settings,
        folder=run.folder.name,
    )


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# {name}

Learnt {learnt} of the caption passes {captions} over a corpus of kind `{source}`: {num_lessons} lessons, {samples}
drawn in all, an epoch after the other, in an order that follows from the seed.

| on held-out images | |
|---|---|
{figures}
| `[train]` | |
|---|---|
{settings}
To make it again: `recap run train --run {folder}`, after the passes it learns from.
"""


# Lessons


def _dataset(taught: Sequence[Lesson], order: Sequence[int]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_list([asdict(lesson) for lesson in taught]).select(order)


def _arranged(taught: Sequence[Lesson], config: Config, processor: Any, *, num_batches: int | None = None) -> list[int]:
    """The order of the lessons; without `num_batches` every one once, as they come."""
    rule = PixelRule.of(processor)
    sizes = [_num_pixels(lesson, rule) for lesson in taught]
    if num_batches is None:
        return sorted(range(len(taught)), key=lambda number: sizes[number])
    return arranged(sizes, num_batches=num_batches, batch_size=config.batch_size, seed=config.seed)


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
    if config.method == "regions":
        yield from (_lesson(image, ()) for image in _images(run))
        return
    read = _verdicts if config.scores else _texts
    for file in sorted((run.folder / "image").glob("*.parquet")):
        shown = {image.key: image for image in tables.read(file, Image) if image.status == "ok"}
        for name in config.captions:
            for image_key, group in groupby(read(run, config, name, file.name), key=lambda asked: asked.key):
                for turns in batched(group, config.turns):
                    yield _lesson(shown[image_key], turns)


def _images(run: Run) -> Iterator[Image]:
    for file in sorted((run.folder / "image").glob("*.parquet")):
        yield from (image for image in tables.read(file, Image) if image.status == "ok")


def _lesson(image: Image, turns: Sequence[Asked]) -> Lesson:
    assert image.file is not None and image.offset is not None and image.num_bytes is not None
    assert image.width is not None and image.height is not None and image.sha256 is not None
    return Lesson(
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
