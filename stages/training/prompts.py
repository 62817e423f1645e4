"""The prompts of a model in training: the recipes of caption passes, or the one that `[train]` names."""

from __future__ import annotations

from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.sections import Run
from stages import recipes
from stages.recipes import Recipe
from stages.training.settings import TrainConfig


def load_recipe(run: Run, config: TrainConfig, caption: str) -> Recipe:
    """The recipe that prompts the model for examples of this caption pass."""
    return recipes.load(config.recipe or run.sections["caption"][caption].recipe, run=run.folder)


def slice_recipes(run: Run, config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the prompts, by caption pass."""
    slices = {name: load_recipe(run, config, name).slice for name in config.captions}
    return {name: {key: value for key, value in words.items() if key != "flags"} for name, words in slices.items()}


def check_captions(run: Run, config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: a caption pass or the recipe does not exist.
    """
    known = sorted(run.sections["caption"])
    if not config.captions:
        raise ConfigError(f"{run.file}: train.captions", f"is empty; there are {', '.join(known)}")
    for name in config.captions:
        if name not in known:
            advice = f"{plugins.explain_unknown(name, known)}; set it to names of [caption.NAME]"
            raise ConfigError(f"{run.file}: train.captions", advice)
    if config.recipe:
        try:
            load_recipe(run, config, config.captions[0])
        except UnknownNameError as error:
            raise ConfigError(f"{run.file}: train.recipe", str(error)) from error
