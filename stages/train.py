"""Decides how a captioner or a judge is trained from the tables of a run: what it starts as, learns from, and leaves.

A training that was killed goes on where it was saved, with the lessons that were to come.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, RefusedError, StoppedError, UnknownNameError, UserError
from pipeline.execution.passes import Pass
from pipeline.execution.states import describe_changes
from pipeline.progress import say
from pipeline.records import Step
from pipeline.sections import Run, stamped
from pipeline.storage import tables
from stages import rubrics, scorers
from stages.scorers import Scorer
from stages.training import trainer
from stages.training.curve import Curve, card
from stages.training.dataset import (
    Collator,
    Rubrics,
    TrainExample,
    digests,
    held_out,
    in_order,
    lessons,
    on_disk,
    recipe_of,
)
from stages.training.settings import Config as Config
from stages.training.trainer import TrainingTask

if TYPE_CHECKING:
    import datasets

VERSION = 2
STORED = "train"  # the folder in the run where checkpoints lie, and while a model learns, what it learns from
CARD = "README.md"  # in the model's folder


def passes(_: Run) -> Iterable[Pass]:
    """None: a model is made from all shards at once, not shard by shard."""
    return ()


def reads(run: Run) -> Sequence[str]:
    """The folders of the tables that the training of `[train]` learns from.

    Raises:
        ConfigError: `[train]` names what is not there.
    """
    config: Config = run.sections["train"][""]
    _check(run, config)
    return _reads(config, _rewards(run, config))


def make(
    run: Run,
    engines: Mapping[str, Engine],
    *,
    stale: Literal["stop", "redo", "keep"] = "stop",
    stop: Event | None = None,
) -> Path:
    """Trains what `[train]` says and returns the model's folder.

    Args:
        engines: those that rewards ask.
        stale: what to do with checkpoints that other words, numbers or tables made; "keep" goes on from them, and has
            a model that they finished for done.
        stop: set from outside, it ends the training with a checkpoint.

    Raises:
        ConfigError: `[train]` names what is not there.
        UserError: there is nothing to learn from, or what is there is stale.
        StoppedError: `stop` was set; the same again goes on.
    """
    config: Config = run.sections["train"][""]
    _check(run, config)
    scored = _rewards(run, config)
    recipe = _settled(run, config, _recipe(run, config, scored), stale)
    if _is_done(run, config, recipe):
        return run.folder / config.output
    asked = {name: _asked(run, name, scorer) for name, scorer in scored.items()}
    task = _task(run, config, _lessons(run, config, asked), curve=Curve(run.folder, recipe), stop=stop or Event())
    task.curve.begin()
    if config.method == "grpo":
        from stages.training.methods import grpo
        from stages.training.methods.grpo import Reward, ending, reader

        form = recipe_of(run, config, config.captions[0]).answer_format
        read = reader(form, ends=ending(task.model, task.processor), max_tokens=config.max_tokens)
        data = task.collator.data
        rewards = [
            Reward(
                name,
                scorer,
                engines=engines,
                data=data,
                asked=asked[name] or {},
                read=read,
                max_error_share=run.max_error_share,
            )
            for name, scorer in scored.items()
        ]
        made = grpo.make_trainer(task, rewards)
    else:
        from stages.training.methods import sft

        made = sft.make_trainer(task)
    made.train(resume_from_checkpoint=trainer.last_checkpoint(task.folder))
    if made.state.global_step < config.steps:
        raise StoppedError
    return _finished(run, task, made)


def _lessons(run: Run, config: Config, asked: Mapping[str, Rubrics | None]) -> datasets.Dataset:
    """
    Raises:
        UserError: there are none; the message says what is to be made first.
    """
    usable = (lesson for lesson in lessons(run, config) if _can_be_scored(lesson, asked))
    if (first := next(usable, None)) is not None:
        return on_disk(run.folder / STORED / "lessons.arrow", chain([first], usable), TrainExample)
    if next(lessons(run, config), None) is None:
        nothing = f"nothing usable in {', '.join(_reads(config, {}))}: make these tables first"
        raise UserError(f"{run.file}: train: there is nothing to learn from: {nothing}")
    missing = ", ".join(name for name, rubrics in asked.items() if rubrics is not None)
    raise UserError(f"{run.file}: train.rewards: no image has a rubric for {missing}: recap run rubric makes them")


def _task(run: Run, config: Config, taught: datasets.Dataset, *, curve: Curve, stop: Event) -> TrainingTask:
    import numpy as np

    pictures = digests(taught)
    learnt, measured = held_out(pictures, num_images=config.eval_images)
    if not len(learnt):
        held = f"{config.eval_images} images held out of {len(taught)} lessons leave nothing to learn"
        raise UserError(f"{run.file}: train.eval_images: {held}")
    model, processor, saved_as = _start(run, config)
    per_batch = config.batch_size // (config.group_size if config.method == "grpo" else 1)
    num_batches = config.steps * config.accumulate
    alike = config.optimizer == "masters"
    order = in_order(
        taught, learnt, processor, alike=alike, per_batch=per_batch, seed=config.seed, num_batches=num_batches
    )
    num_images = len(np.unique(pictures[order]))
    say(f"train: {len(taught)} lessons; {config.steps} steps see {num_images} of their images")
    return TrainingTask(
        config=config,
        model=model,
        saved_as=saved_as,
        processor=processor,
        collator=Collator(processor, regions=config.sees),
        learnt=taught.select(order),
        measured=taught.select(in_order(taught, measured, processor, alike=alike)) if len(measured) else None,
        num_images=num_images,
        folder=run.folder / STORED,
        curve=curve,
        stop=stop,
    )


def _start(run: Run, config: Config) -> tuple[Any, Any, Any]:
    """The model to begin with, its processor, and the type that its weights are saved in: the one that they came in.

    Raises:
        ConfigError: there is no such model, or it does not load.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from stages.scenes import tiny_model
    from stages.training import cpu_speedups

    torch.manual_seed(config.seed)
    if config.model == "new":
        processor = tiny_model.create_processor()
        model: Any = tiny_model.create_model(processor)
        saved_as = torch.bfloat16 if config.optimizer == "masters" else model.dtype
    else:
        name = str(config.model)
        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{run.file}: train.model", f"{name!r} does not load: {error}") from error
        saved_as = model.dtype
        model = model.float()
    processor.tokenizer.padding_side = "left" if config.method == "grpo" else "right"
    if config.optimizer == "masters":
        from stages.training.optimizer import kept_in

        model = model.to(kept_in())
        if not trainer.has_gpu():
            cpu_speedups.install(model, compiled=config.compile)
            if config.method == "grpo":
                cpu_speedups.encode_distinct_images(model.model.visual)
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model, processor, saved_as


def _finished(run: Run, task: TrainingTask, made: Any) -> Path:
    """The model alone, as transformers and vLLM load it, with its card; whole when it is in place."""
    model = made.model.merge_and_unload() if hasattr(made.model, "merge_and_unload") else made.model
    if hasattr(model, trainer.READER):
        delattr(model, trainer.READER)
    model.config.use_cache = True  # the trainer turned it off
    output = run.folder / task.config.output
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(task.saved_as).save_pretrained(partial)
    task.processor.save_pretrained(partial)
    (partial / CARD).write_text(card(run, task.config, made.state.log_history, num_images=task.num_images))
    for file in partial.glob("*.safetensors"):
        shutil.copymode(partial / CARD, file)  # safetensors writes for the owner alone
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    tables.sync_folder(output.parent)
    for file in task.folder.glob("*.arrow*"):  # and what a kill cut short
        file.unlink()
    return output


# What it was trained from


def _recipe(run: Run, config: Config, scored: Mapping[str, Scorer]) -> tables.Provenance:
    """All that decides the model: the words and numbers of `[train]`, its rewards, and the tables that are read."""
    inputs = {folder: _digest(run.folder / folder) for folder in _reads(config, scored)}
    rewards = {f"score.{name}": scorer.slice(run, field=f"score.{name}") for name, scorer in scored.items()}
    words = {**stamped(config), **rewards, "asks": _asks(run, config), "weights": _weights(str(config.model))}
    return tables.Provenance(stage="train", name="", version=VERSION, slice=words, inputs=inputs)


def _reads(config: Config, scored: Mapping[str, Scorer]) -> list[str]:
    """The folders of tables; of the pass that GRPO is asked like, it reads the words alone."""
    learnt = config.captions if config.method == "sft" else ()
    captions = [f"caption/{name}" for name in learnt]
    scores = [f"score/{config.scores}/{name}" for name in learnt if config.scores]
    return ["image", *captions, *scores, *(f"rubric/{scorer.rubric}" for scorer in scored.values() if scorer.rubric)]


def _asks(run: Run, config: Config) -> dict[str, Any]:
    """The words that are put to the model."""
    if config.method == "regions":
        return {}
    if config.scores:
        return stamped(rubrics.load(run.sections["score"][config.scores].scorer.config.rubric, run=run.folder))
    asked = {name: recipe_of(run, config, name).slice for name in config.captions}
    return {name: {key: said for key, said in words.items() if key != "flags"} for name, words in asked.items()}


def _weights(model: str) -> str:
    """The digest of those in a folder; a model on the Hub is known by its name."""
    total = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _digest(folder: Path) -> str:
    stamps = (tables.read_footer(file) for file in sorted(folder.glob("*.parquet")))
    return hashlib.sha256("".join(stamp.digest for stamp in stamps if stamp).encode()).hexdigest()


def _is_done(run: Run, config: Config, recipe: tables.Provenance) -> bool:
    """Whether the model is there, made from the same by all of its steps."""
    path = Curve.path(run.folder)
    if not (run.folder / config.output / CARD).exists() or not path.exists():
        return False
    stamp = tables.read_footer(path)
    made = stamp is not None and stamp.fingerprint == recipe.fingerprint
    return made and max((point.step for point in tables.read_rows(path, Step)), default=0) >= config.steps


def _settled(run: Run, config: Config, recipe: tables.Provenance, stale: str) -> tables.Provenance:
    """What the model is, or is to be, made from: what made the checkpoints, where these are kept.

    Raises:
        RefusedError: what was trained so far was trained otherwise.
    """
    path = Curve.path(run.folder)
    before = tables.read_footer(path) if path.exists() else None
    if before is None and trainer.last_checkpoint(run.folder / STORED) is None:
        return recipe
    if stale == "keep":
        return recipe if before is None else before.provenance
    if before is not None and before.fingerprint == recipe.fingerprint:
        return recipe
    if stale == "redo":
        shutil.rmtree(run.folder / STORED, ignore_errors=True)
        (run.folder / config.output / CARD).unlink(missing_ok=True)  # else the old model would pass for the new one
        path.unlink(missing_ok=True)
        return recipe
    if before is None:
        changed = [f"nobody knows how, for {path} has gone"]
    else:
        inputs = sorted({**before.provenance.inputs, **recipe.inputs})
        others = [name for name in inputs if before.provenance.inputs.get(name) != recipe.inputs.get(name)]
        changed = [*describe_changes(before.provenance, recipe), *(f"{name} has other rows" for name in others)]
    raise RefusedError(
        f"{run.file}: train: checkpoints in {run.folder / STORED} were made otherwise: {'; '.join(changed)};"
        " use --stale redo to begin anew, --stale keep to go on from them"
    )


def _check(run: Run, config: Config) -> None:
    """
    Raises:
        ConfigError: `[train]` names a pass that is not there, or what it needs is not installed.
        UserError: this process sees several GPUs.
    """
    for package in () if config.method == "regions" else ("trl", "peft"):
        if find_spec(package) is None:
            raise ConfigError(f"{run.file}: train", f"needs {package}: pip install 'recap-pipeline[train]'")
    if config.rollouts == "vllm" and find_spec("vllm") is None:
        raise ConfigError(f"{run.file}: train.rollouts", "'vllm' needs it: pip install 'recap-pipeline[vllm]'")
    trainer.check_devices(str(run.file))
    if config.method == "regions":
        return
    known = sorted(run.sections["caption"])
    if not config.captions:
        raise ConfigError(f"{run.file}: train.captions", f"is empty; there are {', '.join(known)}")
    for name in config.captions:
        if name not in known:
            raise ConfigError(f"{run.file}: train.captions", plugins.explain_unknown(name, known))
    if config.scores and config.scores not in run.sections["score"]:
        raise ConfigError(
            f"{run.file}: train.scores", plugins.explain_unknown(config.scores, sorted(run.sections["score"]))
        )
    if config.recipe:
        try:
            recipe_of(run, config, config.captions[0])
        except UnknownNameError as error:
            raise ConfigError(f"{run.file}: train.recipe", str(error)) from error


# Rewards


def _rewards(run: Run, config: Config) -> Mapping[str, Scorer]:
    """
    Raises:
        ConfigError: one is no section of `[score]`.
    """
    known = run.sections["score"]
    for name in config.rewards:
        if name not in known:
            raise ConfigError(f"{run.file}: train.rewards", plugins.explain_unknown(name, sorted(known)))
    found = {
        name: scorers.load_scorer(known[name].scorer, run=run.file.parent, field=f"{run.file}: score.{name}")
        for name in config.rewards
    }
    for name, scorer in found.items():
        if scorer.rubric and scorer.rubric not in run.sections["rubric"]:
            known_rubrics = sorted(run.sections["rubric"])
            raise ConfigError(f"{run.file}: score.{name}.rubric", plugins.explain_unknown(scorer.rubric, known_rubrics))
    return found


def _asked(run: Run, name: str, scorer: Scorer) -> Rubrics | None:
    """Of each image, its own criteria; None where the reward needs none."""
    if not scorer.rubric:
        return None
    files = sorted((run.folder / "rubric" / scorer.rubric).glob("*.parquet"))
    return Rubrics(run.folder / STORED / f"rubric-{name}.arrow", files)


def _can_be_scored(lesson: TrainExample, asked: Mapping[str, Rubrics | None]) -> bool:
    """Whether each reward that needs a rubric has one for the image: an answer to it could not be told from another."""
    return all(lesson.key in rubrics for rubrics in asked.values() if rubrics is not None)
