"""Decides how a captioner or a judge is trained from the tables of a run: what it starts as, learns from, and leaves.

A training that was killed goes on where it was saved, with the lessons that were to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import plugins, tables
from pipeline.config import Run
from pipeline.engine import Engine
from pipeline.errors import ConfigError, UserError
from pipeline.passes import Pass
from pipeline.records import Demand, Rubric
from stages import scorers
from stages.scorers import Scorer
from stages.training import loop
from stages.training.curve import Curve, card
from stages.training.lessons import Collator, Lesson, dataset, held_out, in_order, lessons
from stages.training.loop import Task
from stages.training.settings import Config as Config


def passes(_: Run) -> Iterable[Pass]:
    """None: a model is made from all shards at once, not shard by shard."""
    return ()


def train(run: Run, engines: Mapping[str, Engine]) -> Path:
    """Trains what `[train]` says and returns the model's folder. `engines` are those that rewards ask.

    Raises:
        ConfigError: `[train]` names what is not there.
        UserError: there is nothing to learn from.
    """
    config: Config = run.sections["train"][""]
    output = run.folder / config.output
    scored = _rewards(run, config)
    asked = {name: _asked(run, scorer) for name, scorer in scored.items()}
    task = _task(run, config, [lesson for lesson in lessons(run, config) if _can_be_scored(lesson, asked)])
    if config.method == "grpo":
        from stages.training.reinforced import Reward, trainer

        data = task.collator.data
        rewards = [
            Reward(name, scorer, engines=engines, data=data, asked=asked[name] or {}) for name, scorer in scored.items()
        ]
        made = trainer(task, rewards)
    else:
        from stages.training import supervised

        made = supervised.trainer(task)
    made.train(resume_from_checkpoint=loop.last_checkpoint(task.folder))
    _save(made, task.processor, output)
    num_images = len(set(task.learnt["sha256"]))
    (output / "README.md").write_text(card(run, config, made.state.log_history, num_images=num_images))
    return output


def _task(run: Run, config: Config, taught: list[Lesson]) -> Task:
    learnt, measured = held_out(taught, num_images=config.eval_images)
    if not learnt:
        raise UserError(f"{run.file}: train: {', '.join(config.captions)} taught nothing: make them first")
    model, processor = _start(config)
    per_batch = config.batch_size // (config.group_size if config.method == "grpo" else 1)
    num_batches = config.steps * config.accumulate
    order = in_order(learnt, processor, per_batch=per_batch, seed=config.seed, num_batches=num_batches)
    return Task(
        config=config,
        model=model,
        processor=processor,
        collator=Collator(processor, folder=run.folder, regions=config.sees),
        learnt=dataset(learnt, order),
        measured=dataset(measured, in_order(measured, processor)) if measured else None,
        folder=run.folder / "train",
        curve=Curve(run.folder, config),
    )


def _start(config: Config) -> tuple[Any, Any]:
    """The model to begin with, and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from stages.training import small

    torch.manual_seed(config.seed)
    if config.model == "new":
        processor = small.new_processor()
        model: Any = small.new_model(processor)
    else:
        processor = AutoProcessor.from_pretrained(str(config.model))
        model = AutoModelForImageTextToText.from_pretrained(
            str(config.model), dtype=torch.float32, use_safetensors=True
        )
    processor.tokenizer.padding_side = "left" if config.method == "grpo" else "right"
    if config.optimizer == "masters":
        model = model.bfloat16()
        if not loop.has_gpu():
            small.quicken(model, compiled=config.compile)
            if config.method == "grpo":
                small.see_once(model.model.visual)
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model, processor


def _save(made: Any, processor: Any, output: Path) -> None:
    """The model alone, as transformers and vLLM load it."""
    model = made.model.merge_and_unload() if hasattr(made.model, "merge_and_unload") else made.model
    if hasattr(model, loop.READER):
        delattr(model, loop.READER)
    model.config.use_cache = True  # the trainer turned it off
    model.save_pretrained(output)
    processor.save_pretrained(output)


# Rewards


def _rewards(run: Run, config: Config) -> Mapping[str, Scorer]:
    """
    Raises:
        ConfigError: one is no section of `[score]`.
    """
    known = run.sections["score"]
    for name in config.rewards:
        if name not in known:
            raise ConfigError(f"{run.file}: train.rewards", plugins.unknown(name, sorted(known)))
    return {
        name: scorers.load(known[name].scorer, run=run.file.parent, field=f"{run.file}: score.{name}")
        for name in config.rewards
    }


def _asked(run: Run, scorer: Scorer) -> Mapping[str, tuple[Demand, ...]] | None:
    """Of each image, the criteria that were written for it; None for a scorer that reads no rubric pass."""
    if not scorer.rubric:
        return None
    files: Sequence[Path] = sorted((run.folder / "rubric" / scorer.rubric).glob("*.parquet"))
    return {row.key: row.criteria for file in files for row in tables.read(file, Rubric) if row.status == "ok"}


def _can_be_scored(lesson: Lesson, asked: Mapping[str, Mapping[str, tuple[Demand, ...]] | None]) -> bool:
    """Whether each reward that needs a rubric has one for the image: an answer to it could not be told from another."""
    return all(lesson.key in rubrics for rubrics in asked.values() if rubrics is not None)
