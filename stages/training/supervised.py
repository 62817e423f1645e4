"""TRL's SFTTrainer for examples that are already in order, with the region head where image tokens are labelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.training import trainer
from stages.training.trainer import TrainingTask

Loss = Callable[[Any, Any, dict[str, Any], Callable[[], Any]], Any]  # of a trainer, model, batch and TRL's own loss


def make_trainer(task: TrainingTask, *, add_region_head: bool, compute_loss: Loss) -> Any:
    from trl import SFTConfig, SFTTrainer

    model = task.model

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            def compute_own_loss() -> Any:
                return SFTTrainer.compute_loss(self, model, inputs, *args, **kwargs)

            return compute_loss(self, model, inputs, compute_own_loss)

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            trainer.load_weights(self.model if model is None else model, Path(folder))

    args = SFTConfig(
        **trainer.make_arguments(task),
        gradient_checkpointing=trainer.has_gpu(),
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if add_region_head:
        from stages.scenes.region_head import RegionReader

        # A part of the model, so that its weights are trained and saved with the others.
        head = RegionReader(model.model.visual, model.config.text_config.hidden_size).to(model.dtype)
        model.add_module(trainer.REGION_HEAD, head)
    made = Trainer(
        model=model,
        args=args,
        processing_class=task.processor,
        data_collator=task.collator,
        train_dataset=task.train_data,
        eval_dataset=task.eval_data,
        peft_config=trainer.make_adapters(task.config),
        optimizers=(trainer.make_optimizer(task), None),
        callbacks=[trainer.make_callback(task)],
    )
    trainer.remove_printer(made)
    return made
