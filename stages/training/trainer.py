"""Decides what all trainings share: schedule, checkpoints, what is told and kept on the way, and how one goes on.

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
from stages.training.curve import Curve
from stages.training.dataset import Collator
from stages.training.settings import Config

if TYPE_CHECKING:
    import datasets

TOLD = {"loss", "mean_token_accuracy", "reward", "eval_loss", "eval_mean_token_accuracy", "eval_reward"}  # in messages
READER = "region_reader"  # the part of the model that is thrown away in the end


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A training, ready: a model with its processor, and lessons that are already in order."""

    config: Config
    model: Any
    saved_as: Any  # torch.dtype of the weights that are left
    processor: Any
    collator: Collator
    learnt: datasets.Dataset
    measured: datasets.Dataset | None  # held out
    num_images: int  # that are learnt from, copies once
    folder: Path  # where its checkpoints lie
    curve: Curve
    stop: Event  # set when it is to be left, with a checkpoint


def arguments(task: TrainingTask) -> dict[str, Any]:
    """What the arguments of every trainer of transformers have in common."""
    config = task.config
    # Drawing answers takes so long that a picture is never waited for; and who is forked at an evaluation, when the
    # process is at its largest, would keep a copy of all of it.
    num_workers = 0 if config.method == "grpo" else config.num_workers
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
        "eval_strategy": "no" if task.measured is None else "steps",
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


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def check_devices(file: str) -> None:
    """
    Raises:
        UserError: several GPUs are visible, which one process cannot use.
    """
    import torch

    if torch.cuda.device_count() > 1:
        raise UserError(
            f"{file}: train: {torch.cuda.device_count()} GPUs are visible, and a training uses one: set"
            " CUDA_VISIBLE_DEVICES to the one that it is to have, and give the others to served engines"
        )


def optimizer(task: TrainingTask) -> Any:
    """None: the trainer's own AdamW."""
    config = task.config
    if config.optimizer == "adamw":
        return None
    from stages.training.optimizer import MixedPrecisionMuon

    return MixedPrecisionMuon(task.model, lr=config.learning_rate, weight_decay=config.weight_decay, muon=config.muon)


def keeper(task: TrainingTask) -> Any:
    """The callback that keeps the curve at each checkpoint, tells what is logged, and stops when it is told to."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):  # type: ignore[misc]
        def on_save(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            task.curve.write(state.log_history)

        on_train_end = on_save

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
            if task.stop.is_set():
                control.should_save = control.should_training_stop = True

        def on_log(
            self, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any
        ) -> None:
            told = TOLD - {"eval_loss"} if task.config.method == "grpo" else TOLD  # one answer to an image has none
            shown = {name: float(value) for name, value in (logs or {}).items() if name in told and value is not None}
            if shown:
                line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
                say(f"train: step {state.global_step}/{task.config.steps}, {line}")

    return Keeper()


def quiet(trainer: Any) -> Any:
    """Without the callback that writes to stdout, where only data goes."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the trainer writes its state last."""
    found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return next((str(path.parent) for path in reversed(found) if _is_json(path)), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def reload(model: Any, folder: Path) -> None:
    """The weights of a checkpoint by the names that the model itself saves under, those of the region reader too.

    The trainers' own way finds none of a Qwen2.5-VL's names.

    Raises:
        RuntimeError: the checkpoint lacks some.
    """
    from safetensors.torch import load_file

    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    for file in folder.glob("*.safetensors"):
        saved |= {name: value for name, value in load_file(file).items() if name.startswith(READER)}
    model.load_state_dict(saved)


def adapters(config: Config) -> Any:
    """LoRA on every linear layer of the language model, alpha twice the rank; None: the whole model is trained."""
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
