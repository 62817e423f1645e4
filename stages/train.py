"""Decides how a captioner or a judge is trained from the tables of a run.

A lesson is an image with questions and the answers to be learnt. It refuses to know where the answers come from: a
teacher's captions and a judge's verdicts are tables like all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import key

if TYPE_CHECKING:
    import datasets
    import torch

IGNORED = -100  # a label that is not learnt


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[train]`."""

    method: Literal["sft"] = key("sft", "sft: learn the answers word by word")
    model: str = key("new", "a model's folder or name on the Hub; new: a small Qwen2.5-VL, untrained", locate="model")
    output: str = key("model", "the folder in the run that the trained model is written to", stamp=False)
    captions: tuple[str, ...] = key(("main",), "caption passes whose texts, or whose scores, are learnt")
    scores: str = key("", "a score pass by a judge: its verdicts are learnt; empty: the captions' texts are")
    turns: int = key(1, "questions about one image in one lesson", least=1)
    regions: float = key(0.0, "weight of naming what lies under each image token (labelled scenes only)", least=0)
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
    precision: Literal["float32", "bfloat16"] = key("float32", "of the computation")
    eval_images: int = key(256, "images held out of training, to measure on", least=0)
    eval_steps: int = key(100, "steps between measurements", least=1, stamp=False)
    save_steps: int = key(100, "steps between checkpoints", least=1, stamp=False)
    seed: int = key(0, "of the order of lessons and of new weights", least=0)
    num_workers: int = key(1, "processes that prepare lessons", least=0, stamp=False)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An image with questions about it and their answers."""

    source_key: str
    file: str  # the tar that holds the image
    offset: int
    num_bytes: int
    width: int
    height: int
    system: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


class Collator:
    """Turns lessons into a batch of tensors; only answers are labels."""

    def __init__(self, processor: Any, *, folder: Path, regions: bool = False) -> None:
        self._processor, self._folder, self._regions = processor, folder, regions

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
            batch["regions"] = self._answers(lessons, pixels["image_grid_thw"])
        return batch

    def picture(self, lesson: Mapping[str, Any]) -> Any:
        import io

        from PIL import Image

        return Image.open(io.BytesIO(self.data(lesson))).convert("RGB")

    def data(self, lesson: Mapping[str, Any]) -> bytes:
        with open(self._folder / lesson["file"], "rb") as file:
            return os.pread(file.fileno(), lesson["num_bytes"], lesson["offset"])

    def _tokens(self, lesson: Mapping[str, Any], num_image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids and labels: the conversation so far is never a label, an answer with its end always is."""
        tokenizer = self._processor.tokenizer
        ids: list[int] = []
        labels: list[int] = []
        messages: list[dict[str, Any]] = [{"role": "system", "content": lesson["system"]}] if lesson["system"] else []
        asked = ""
        for turn, (question, answer) in enumerate(zip(lesson["questions"], lesson["answers"], strict=True)):
            content = [{"type": "image"}] * (turn == 0) + [{"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
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

    def _answers(self, lessons: Sequence[Mapping[str, Any]], grids: Any) -> torch.Tensor:
        import torch

        from pipeline.sources.scenes import scene_of
        from stages._regions import targets

        merge = self._processor.image_processor.merge_size
        parts = [
            torch.from_numpy(
                targets(scene_of(lesson["source_key"]), rows=int(grid[1]) // merge, columns=int(grid[2]) // merge)
            )
            for lesson, grid in zip(lessons, grids, strict=True)
        ]
        return torch.cat(parts)


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


def trainer(
    config: Config,
    *,
    model: Any,
    processor: Any,
    collator: Collator,
    train: datasets.Dataset,
    held_out: datasets.Dataset | None,
    folder: Path,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's trainer for lessons that are already in order."""
    from trl import SFTConfig, SFTTrainer

    from stages._masters import Masters

    class Trainer(SFTTrainer):  # type: ignore[misc]
        reader: Any = None

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            regions = inputs.pop("regions", None)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if regions is None or self.reader is None:
                return loss
            named = self.reader.loss(regions)
            self._metrics["train" if model.training else "eval"]["regions_loss"].append(named.item())
            return loss + config.regions * named if model.training else loss

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
        eval_strategy="steps" if held_out is not None else "no",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=20,
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
    reader = None
    if config.regions:
        from stages._regions import Reader

        reader = Reader(model.model.visual, model.config.text_config.hidden_size).to(model.dtype)
        model.add_module("region_reader", reader)  # so that its weights are stepped and kept with the model's
    optimizer = None
    if config.optimizer == "masters":
        optimizer = Masters(model, lr=config.learning_rate, weight_decay=config.weight_decay)
    made = Trainer(
        model=model,
        args=args,
        processing_class=processor,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    made.reader = reader
    return made


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def rows(lessons: Iterator[Lesson]) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_generator(lambda: (vars(lesson) for lesson in lessons))
