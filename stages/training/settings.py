"""The keys of `[train]`: those of every training, and those of its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline import plugins
from pipeline.records import column_names
from pipeline.sections import Plugin, PluginChoice, key, stamped
from pipeline.validation import Section

PLUGINS = PluginChoice(package="stages.training.methods", selector="method", default="sft")
STAMPED_METHODS = ("sft", "regions", "grpo")  # every model is stamped with the keys of all three


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of `[train]` that every method has."""

    method: str = key(
        "sft",
        "sft: learn the answers token by token; grpo: learn from the scores of generated answers; regions: train the"
        " vision tower alone, on labelled scenes; or a module of your own with a dot",
    )
    model: str = key("new", "a model's folder or name on the Hub; new: a small untrained Qwen2.5-VL", locate="model")
    output: str = key("model", "the folder in the run that the trained model is written to", stamp=False)
    captions: tuple[str, ...] = key(
        ("main",),
        "names of [caption.NAME]; sft: the passes to learn from; grpo: the one whose prompt the model answers",
    )
    recipe: str = key("", "the recipe that prompts the model; empty: the recipe of each of `captions`")
    steps: int = key(1000, "optimizer steps", least=1)
    batch_size: int = key(64, "examples, or answers for grpo, in a batch on one device", least=1)
    accumulate: int = key(1, "batches in a step", least=1)
    learning_rate: float = key(1e-5, "the peak learning rate", least=0)
    warmup_steps: int = key(20, "steps until the peak", least=0)
    decay: Literal["linear", "cosine", "constant"] = key("cosine", "the schedule after the peak")
    weight_decay: float = key(0.01, "decoupled weight decay", least=0)
    optimizer: Literal["adamw", "masters"] = key(
        "adamw",
        "masters: 16-bit weights updated through 32-bit copies, matrices by Muon; for small models on a CPU",
    )
    muon: float = key(16.0, "Muon's learning rate over AdamW's (masters only); 0: AdamW for matrices too", least=0)
    freeze_vision: bool = key(False, "do not train the vision tower")
    precision: Literal["float32", "bfloat16"] = key("float32", "of the computation")
    lora: int = key(0, "rank of LoRA adapters, which are trained instead of the model; 0: none", least=0)
    eval_images: int = key(256, "images held out of training for evaluation", least=0)
    eval_steps: int = key(100, "steps between evaluations", least=1, stamp=False)
    log_steps: int = key(20, "steps between points of the curve", least=1, stamp=False)
    save_steps: int = key(100, "steps between checkpoints", least=1, stamp=False)
    compile: bool = key(
        False, "compile the layers (masters on a CPU only): starts more slowly, then a third faster", stamp=False
    )
    rounds: int = key(
        1,
        "how often the model captions, gets rubrics and is trained, each time from where it is; grpo only. Rounds after"
        " the first have their tables and models in rounds/N",
        stamp=False,
        least=1,
    )
    seed: int = key(0, "of the order of examples, of new weights and of generated answers", least=0)
    num_workers: int = key(1, "processes that prepare examples; grpo uses none", least=0, stamp=False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """`[train]`, read: the common keys, and the method with its own keys."""

    options: Plugin = key(stamp=False)

    def __post_init__(self) -> None:
        if check := getattr(self.options.module, "check_config", None):
            check(self)


def read_section(section: Section) -> TrainConfig:
    """
    Raises:
        ConfigError: the method is unknown, or a key fits neither the stage nor the method.
    """
    common = frozenset(column_names(Config))
    _refuse_keys_of_other_methods(section, common)
    method = section.plugin(PLUGINS, common=common - {PLUGINS.selector})
    config = section.select_keys(common).parse(Config)
    try:
        return TrainConfig(**vars(config), options=method)
    except ValueError as error:
        raise section.error("", str(error)) from error


def _refuse_keys_of_other_methods(section: Section, common: frozenset[str]) -> None:
    method, methods = section.values.get("method", PLUGINS.default), plugins.list_names(PLUGINS.package)
    if method not in methods:
        return
    keys = {name: frozenset(column_names(plugins.load(PLUGINS.package, name).Config)) for name in methods}
    for name in section.values.keys() - common - keys[method]:
        for owner in methods:
            if name in keys[owner]:
                message = f'is a key of method = "{owner}", and this is method = "{method}"'
                raise section.error(name, f"{message}: remove it, or change the method")


def stamp_config(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the model, as JSON values."""
    defaults = [stamped(plugins.load(PLUGINS.package, name).Config()) for name in STAMPED_METHODS]
    merged = {name: value for keys in defaults for name, value in keys.items()}
    return {**stamped(config), **merged, **stamped(config.options.config)}
