"""The prompts of a model in training: the recipes of caption passes, or the one that `[train]` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Shard
from pipeline.records import Image
from pipeline.sections import Run
from stages import recipes
from stages.recipes import Recipe
from stages.training.settings import TrainConfig


def load_recipe(run: Run, config: TrainConfig, caption: str) -> Recipe:
    """The recipe that prompts the model for examples of this caption pass."""
    return recipes.load_for_pass(run, caption, name=config.recipe)[0]


def open_prompts(run: Run, config: TrainConfig, caption: str, file: str) -> Callable[[Image], str | None]:
    """A function from the images of a table file, in order, to the prompts of this caption pass; None: it asks none."""
    recipe, given = recipes.load_for_pass(run, caption, name=config.recipe)
    find_texts = given.open(Shard(run=run, number=int(Path(file).stem), pieces=()))

    def build_prompt(image: Image) -> str | None:
        texts = find_texts(image.key)
        if recipe.find_missing(image.alt_text, texts):
            return None
        return recipe.build_prompt(image.alt_text, texts).prompt

    return build_prompt


def list_given_tables(run: Run, config: TrainConfig) -> list[str]:
    """The folders of the tables that `given` of these caption passes reads."""
    reads = [recipes.load_for_pass(run, name, name=config.recipe)[1].reads for name in config.captions]
    return list(dict.fromkeys(folder for folders in reads for folder in folders))


def slice_recipes(run: Run, config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the prompts, by caption pass."""
    slices = {name: load_recipe(run, config, name).slice for name in config.captions}
    for name in slices:
        slices[name] |= {"given": dict(given)} if (given := run.sections["caption"][name].given) else {}
    return {name: {key: value for key, value in words.items() if key != "flags"} for name, words in slices.items()}


def check_captions(run: Run, config: TrainConfig, *, without_image: bool, are_answers: bool = True) -> None:
    """
    Args:
        run: the run.
        config: of the training.
        without_image: whether the method can train on prompts that show no image.
        are_answers: the model learns to answer their recipes; else a judge learns verdicts on them.

    Raises:
        ConfigError: a caption pass or the recipe does not exist, or the recipe does not fit the method.
    """
    known = sorted(run.sections["caption"])
    if not config.captions:
        raise ConfigError(f"{run.file}: train.captions", f"is empty; there are {', '.join(known)}")
    for name in config.captions:
        if name not in known:
            advice = f"{plugins.explain_unknown(name, known)}; set it to names of [caption.NAME]"
            raise ConfigError(f"{run.file}: train.captions", advice)
        if not are_answers:
            continue
        if run.sections["caption"][name].words and not config.recipe:
            advice = (
                f"is missing: no model wrote the captions of {name}; name the recipe with whose prompt they are learnt"
            )
            raise ConfigError(f"{run.file}: train.recipe", advice)
        try:
            recipe = load_recipe(run, config, name)
        except UnknownNameError as error:
            raise ConfigError(f"{run.file}: train.recipe", str(error)) from error
        if recipe.examples:
            advice = f"the recipe of {name} shows examples, which a model in training does not see; name another recipe"
            raise ConfigError(f"{run.file}: train.recipe", advice)
        if not (recipe.spec.image or without_image):
            advice = f"the recipe of {name} shows its model no image (image = false), which {config.options.kind} needs"
            raise ConfigError(f"{run.file}: train.captions", advice)
