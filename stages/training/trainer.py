"""The parts that the trainers of all methods share: arguments, optimizer, checkpoints and progress.

It does not know what is learnt, nor from what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.progress import say
from stages.training.collator import Collator
from stages.training.curve import Curve
from stages.training.settings import TrainConfig

if TYPE_CHECKING:
    import datasets

FOLDER = "train"  # in the run; holds checkpoints, and the examples while a model is trained
REGION_HEAD = "region_reader"  # the part of the model that is removed after training
LOGGED = ("loss", "mean_token_accuracy", "reward", "eval_loss", "eval_mean_token_accuracy", "eval_reward")


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A training, ready to start: a model with its processor, and examples that are already in order."""

    config: TrainConfig
    generates: bool  # whether the model generates answers while it is trained
    model: Any
    save_dtype: Any  # torch.dtype of the saved weights
    processor: Any
    collator: Collator
    train_data: datasets.Dataset
    eval_data: datasets.Dataset | None  # held out
    num_images: int  # distinct, in the training data
    folder: Path  # of its checkpoints
    curve: Curve
    stop: Event  # when it is set, training ends with a checkpoint


def make_arguments(task: TrainingTask) -> dict[str, Any]:
    """Arguments that the trainers of all methods have in common."""
    config = task.config
    # Generation takes so long that no image is ever waited for; and workers that are forked during an evaluation, when
    # the process is largest, would each keep a copy of its memory.
    num_workers = 0 if task.generates else config.num_workers
    return {
        "output_dir": str(task.folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": config.decay,
        "weight_decay": config.weight_decay,
        "bf16": config.precision == "bfloat16" and config.optimizer == "adamw",
        "use_cpu": not has_gpu(),
        "eval_strategy": "no" if task.eval_data is None else "steps",
        "eval_steps": config.eval_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "logging_steps": config.log_steps,
        "seed": config.seed,
        "remove_unused_columns": False,
        "dataloader_num_workers": num_workers,
        "dataloader_prefetch_factor": 4 if num_workers else None,
        "dataloader_persistent_workers": num_workers > 0,
        "disable_tqdm": True,
        "report_to": "none",
    }


def end_workers(made: Any) -> None:
    """Ends the workers of a trainer's data loaders.

    They ignore the signal by which Python ends them with the process, so a loader that something still holds would keep
    the process for ever.
    """
    handler = made.callback_handler
    loaders = [handler.train_dataloader, handler.eval_dataloader, *getattr(made, "_eval_dataloaders", {}).values()]
    for loader in loaders:
        for one in (loader, getattr(loader, "base_dataloader", None)):
            if (iterator := getattr(one, "_iterator", None)) is not None:
                iterator._shutdown_workers()


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def check_devices(file: Path) -> None:
    """
    Raises:
        UserError: several GPUs are visible, of which one process would use one.
    """
    import torch

    if torch.cuda.device_count() > 1:
        raise UserError(
            f"{file}: train: {torch.cuda.device_count()} GPUs are visible, and a training uses one: set"
            " CUDA_VISIBLE_DEVICES to that one, and leave the others to served engines"
        )


def make_optimizer(task: TrainingTask) -> Any:
    """The optimizer; None for the trainer's own AdamW."""
    config = task.config
    if config.optimizer == "adamw":
        return None
    from stages.training.optimizer import MixedPrecisionMuon

    return MixedPrecisionMuon(task.model, lr=config.learning_rate, weight_decay=config.weight_decay, muon=config.muon)


def make_adapters(config: TrainConfig) -> Any:
    """LoRA on every linear layer of the language model, alpha twice the rank; None to train the whole model."""
    if not config.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora,
        lora_alpha=2 * config.lora,
        target_modules="all-linear",
        exclude_modules=r".*visual.*",
        task_type="CAUSAL_LM",
    )


def make_callback(task: TrainingTask) -> Any:
    """The callback that saves the curve with each checkpoint, prints progress and heeds `task.stop`."""
    from transformers import TrainerCallback

    # The evaluation of a method that generates has one answer to an image, so its loss means nothing.
    logged = set(LOGGED) - {"eval_loss"} if task.generates else set(LOGGED)

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_save(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            task.curve.write(state.log_history)

        on_train_end = on_save

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
            if task.stop.is_set():
                control.should_save = control.should_training_stop = True

        def on_log(
            self, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any
        ) -> None:
            values = {name: value for name, value in (logs or {}).items() if name in logged and value is not None}
            if values:
                line = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
                say(f"train: step {state.global_step}/{task.config.steps}, {line}")

    return Callback()


def remove_printer(trainer: Any) -> None:
    """Removes the callback that writes to stdout, which is for data only."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def find_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint: the trainer writes its state last."""
    states = sorted(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    return next((str(path.parent) for path in reversed(states) if _is_json(path)), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def load_weights(model: Any, folder: Path) -> None:
    """Loads a checkpoint's weights, the region head's included, by the names that the model itself saves under.

    The trainers' own loading finds none of a Qwen2.5-VL's names.

    Raises:
        RuntimeError: the checkpoint lacks some.
    """
    from safetensors.torch import load_file

    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    weights = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    for file in folder.glob("*.safetensors"):
        weights |= {name: value for name, value in load_file(file).items() if name.startswith(REGION_HEAD)}
    model.load_state_dict(weights)
