"""Decides how answers are learnt word by word, and what is seen without words: TRL's SFTTrainer over lessons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.training import trainer
from stages.training.trainer import TrainingTask

if TYPE_CHECKING:
    import torch


def make_trainer(task: TrainingTask) -> Any:
    """TRL's trainer, for lessons that are already in order."""
    from trl import SFTConfig, SFTTrainer

    config, model = task.config, task.model

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
            trainer.reload(self.model if model is None else model, Path(folder))

    args = SFTConfig(
        **trainer.arguments(task),
        gradient_checkpointing=trainer.has_gpu(),
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if config.sees:
        from stages.scenes.region_head import RegionReader

        # as a part of the model, so that its weights are stepped and kept with the others
        reader = RegionReader(model.model.visual, model.config.text_config.hidden_size).to(model.dtype)
        model.add_module(trainer.READER, reader)
    made = Trainer(
        model=model,
        args=args,
        processing_class=task.processor,
        data_collator=task.collator,
        train_dataset=task.learnt,
        eval_dataset=task.measured,
        peft_config=trainer.adapters(config),
        optimizers=(trainer.optimizer(task), None),
        callbacks=[trainer.keeper(task)],
    )
    return trainer.quiet(made)
