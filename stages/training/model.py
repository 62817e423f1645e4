"""The model that a training begins with, and the folder that it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.sections import Run
from pipeline.storage.disk import sync_path
from stages.training import trainer
from stages.training.curve import CARD
from stages.training.settings import TrainConfig
from stages.training.trainer import TrainingTask


def load_model(run: Run, config: TrainConfig, *, generates: bool) -> tuple[Any, Any, Any]:
    """The model, its processor, and the type in which its weights came and will be saved.

    Raises:
        ConfigError: there is no such model, or it does not load.
    """
    import torch

    torch.manual_seed(config.seed)
    model, processor, save_dtype = _create_model(config) if config.model == "new" else _read_model(run, config)
    processor.tokenizer.padding_side = "left" if generates else "right"
    if config.optimizer == "masters":
        from stages.training import cpu_speedups
        from stages.training.optimizer import choose_dtype

        model = model.to(choose_dtype())
        if not trainer.has_gpu():
            cpu_speedups.install(model, compiled=config.compile)
            if generates:
                cpu_speedups.encode_distinct_images(model.model.visual)
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model, processor, save_dtype


def _create_model(config: TrainConfig) -> tuple[Any, Any, Any]:
    import torch

    from stages.scenes import tiny_model

    processor = tiny_model.create_processor()
    model = tiny_model.create_model(processor)
    return model, processor, torch.bfloat16 if config.optimizer == "masters" else model.dtype


def _read_model(run: Run, config: TrainConfig) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = str(config.model)
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.file}: train.model", f"{name!r} does not load: {error}") from error
    save_dtype = model.dtype
    return model.float(), processor, save_dtype


def save_model(task: TrainingTask, model: Any, *, output: Path, card: str) -> None:
    """Writes the model alone, as transformers and vLLM load it, with its card; a folder in place is complete."""
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if hasattr(model, trainer.REGION_HEAD):
        delattr(model, trainer.REGION_HEAD)
    model.config.use_cache = True  # the trainer turned it off
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(task.save_dtype).save_pretrained(partial)
    task.processor.save_pretrained(partial)
    (partial / CARD).write_text(card)
    for file in partial.glob("*.safetensors"):
        shutil.copymode(partial / CARD, file)  # safetensors makes files that only their owner can read
    for path in (*partial.iterdir(), partial):
        sync_path(path)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    sync_path(output.parent)
