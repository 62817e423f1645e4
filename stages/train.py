"""The stage that trains a captioner or a judge from the tables of a run; an interrupted training resumes.

It does not know how a model learns; that is a method's, in training/methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from pipeline.engines import Engine
from pipeline.errors import ConfigError, StoppedError, UserError
from pipeline.execution.passes import Pass
from pipeline.progress import say
from pipeline.sections import Run
from stages.training import trainer
from stages.training.collator import Collator
from stages.training.curve import Curve, render_card
from stages.training.dataset import write_dataset
from stages.training.methods import Method
from stages.training.model import load_model, save_model
from stages.training.order import order_examples, read_digests, split_examples
from stages.training.provenance import build_provenance, is_done, resolve_stale
from stages.training.rounds import check_rounds, prepare_next_round
from stages.training.settings import PLUGINS as PLUGINS
from stages.training.settings import Config as Config
from stages.training.settings import TrainConfig
from stages.training.settings import read_section as read_section
from stages.training.trainer import TrainingTask

if TYPE_CHECKING:
    import datasets


def passes(_: Run) -> Iterable[Pass]:
    """None: a model is made from all shards at once."""
    return ()


def reads(run: Run) -> Sequence[str]:
    """The folders of the tables that `[train]` learns from.

    Raises:
        ConfigError: `[train]` names something that does not exist.
    """
    return open_method(run).list_tables()


def make(
    run: Run,
    engines: Mapping[str, Engine],
    *,
    stale: Literal["stop", "redo", "keep"] = "stop",
    stop: Event | None = None,
) -> Path:
    """Trains the model of `[train]` and returns its folder.

    Args:
        engines: those that rewards use.
        stale: what to do with checkpoints that were trained from something else; "keep" resumes from them, and accepts
            a model that they finished.
        stop: when it is set, training ends with a checkpoint.

    Raises:
        ConfigError: `[train]` names something that does not exist.
        UserError: there is nothing to learn from, or the checkpoints are stale.
        StoppedError: `stop` was set; the same call resumes.
    """
    config: TrainConfig = run.sections["train"][""]
    output = run.folder / config.output
    method = open_method(run)
    provenance = resolve_stale(run, config, build_provenance(run, config, method), stale)
    if is_done(run, config, provenance):
        return output
    task = _prepare_task(run, method, _write_examples(run, method), Curve(run.folder, provenance), stop or Event())
    task.curve.create()
    made = method.make_trainer(task, engines)
    try:
        made.train(resume_from_checkpoint=trainer.find_checkpoint(task.folder))
    except RuntimeError as error:
        if not task.stop.is_set():
            raise
        raise StoppedError from error  # the signal killed a worker of the data loader that had just started
    finally:
        trainer.end_workers(made)
    if made.state.global_step < config.steps:
        raise StoppedError
    save_model(task, made.model, output=output, card=_render_card(run, task, method, made.state.log_history))
    for file in task.folder.glob("*.arrow*"):  # and incomplete ones of a killed process
        file.unlink()
    return output


def next_run(run: Run, product: Path) -> Run | None:
    """The run of the next round; None after the last."""
    return prepare_next_round(run, product, reads(run))


def open_method(run: Run) -> Method:
    """
    Raises:
        ConfigError: `[train]` names something that does not exist, or a package is not installed.
        UserError: this process sees several GPUs.
    """
    config: TrainConfig = run.sections["train"][""]
    for package in ("trl", "peft"):
        if find_spec(package) is None:
            raise ConfigError(f"{run.file}: train", f"needs {package}: pip install '.[train]' in a clone of recap")
    trainer.check_devices(run.file)
    method: Method = config.options.module.open(run, config)
    check_rounds(run, config, method.list_tables(), generates=method.generates)
    return method


def _write_examples(run: Run, method: Method) -> datasets.Dataset:
    """
    Raises:
        UserError: there are none.
    """
    examples = method.read_examples()
    first = next(examples, None)
    if first is None:
        empty = f"nothing usable in {', '.join(method.list_tables())}: make these tables first"
        raise UserError(f"{run.file}: train: there is nothing to learn from: {empty}")
    return write_dataset(run.folder / trainer.FOLDER / "examples.arrow", chain([first], examples))


def _prepare_task(run: Run, method: Method, examples: datasets.Dataset, curve: Curve, stop: Event) -> TrainingTask:
    import numpy as np

    config: TrainConfig = run.sections["train"][""]
    digests = read_digests(examples)
    train, evaluation = split_examples(digests, num_eval_images=config.eval_images)
    if not len(train):
        message = f"{config.eval_images} images held out of {len(examples)} examples leave nothing to learn"
        raise UserError(f"{run.file}: train.eval_images: {message}")
    model, processor, save_dtype = load_model(run, config, generates=method.generates)
    same_size = config.optimizer == "masters"
    order = order_examples(
        examples,
        train,
        processor,
        same_size=same_size,
        batch_size=config.batch_size // method.answers_per_example,
        seed=config.seed,
        num_batches=config.steps * config.accumulate,
    )
    num_images = len(np.unique(digests[order]))
    say(f"train: {len(examples)} examples; {config.steps} steps see {num_images} of their images")
    eval_order = order_examples(examples, evaluation, processor, same_size=same_size)
    return TrainingTask(
        config=config,
        generates=method.generates,
        model=model,
        save_dtype=save_dtype,
        processor=processor,
        collator=Collator(processor, regions=method.learns_regions),
        train_data=examples.select(order),
        eval_data=examples.select(eval_order) if len(evaluation) else None,
        num_images=num_images,
        folder=run.folder / trainer.FOLDER,
        curve=curve,
        stop=stop,
    )


def _render_card(run: Run, task: TrainingTask, method: Method, log: Sequence[Mapping[str, Any]]) -> str:
    return render_card(
        run,
        task.config,
        log,
        description=method.describe(),
        generates=method.generates,
        num_images=task.num_images,
    )
