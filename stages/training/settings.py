"""Decides what can be said of a training in run.toml: the keys of `[train]`, their bounds and their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from pipeline.sections import key


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[train]`."""

    method: Literal["sft", "regions", "grpo"] = key(
        "sft",
        "sft: learn the answers word by word; grpo: learn from the scores of its own answers; regions: the vision tower"
        " alone, on labelled scenes",
    )
    model: str = key("new", "a model's folder or name on the Hub; new: a small Qwen2.5-VL, untrained", locate="model")
    output: str = key("model", "the folder in the run that the trained model is written to", stamp=False)
    captions: tuple[str, ...] = key(
        ("main",), "sft: caption passes whose texts, or whose scores, are learnt; grpo: the one whose words are asked"
    )
    recipe: str = key("", "what the model is asked; empty: what each of `captions` asked")
    scores: str = key("", "sft: a score pass by a judge: its verdicts are learnt; empty: the captions' texts are")
    turns: int = key(1, "sft: questions about one image in one lesson", least=1)
    regions: float = key(0.0, "sft: weight of naming what lies under each image token besides", least=0)
    steps: int = key(1000, "steps of the optimizer", least=1)
    batch_size: int = key(64, "lessons, or for grpo answers, in a step on one device", least=1)
    accumulate: int = key(1, "batches in a step", least=1)
    learning_rate: float = key(1e-5, "its peak", least=0)
    warmup_steps: int = key(20, "steps until the peak", least=0)
    decay: Literal["linear", "cosine", "constant"] = key("cosine", "how it falls after the peak")
    weight_decay: float = key(0.01, "pull towards zero", least=0)
    optimizer: Literal["adamw", "masters"] = key(
        "adamw", "masters: weights in 16 bits stepped on 32-bit copies, matrices by Muon: for small models on a CPU"
    )
    muon: float = key(16.0, "its learning rate over the others' (masters only); 0: matrices by AdamW too", least=0)
    freeze_vision: bool = key(False, "leave the vision tower as it is")
    precision: Literal["float32", "bfloat16"] = key("float32", "of the computation")
    lora: int = key(0, "rank of the adapters that are trained in the model's place; 0: the whole model is", least=0)
    eval_images: int = key(256, "images held out of training, to measure on", least=0)
    eval_steps: int = key(100, "steps between measurements", least=1, stamp=False)
    log_steps: int = key(20, "steps between points of the curve", least=1, stamp=False)
    save_steps: int = key(100, "steps between checkpoints", least=1, stamp=False)
    compile: bool = key(
        False, "compile the layers (masters on a CPU only): a slower start, then a third faster", stamp=False
    )
    seed: int = key(0, "of the order of lessons, of new weights and of the answers drawn", least=0)
    num_workers: int = key(1, "processes that prepare lessons; grpo has none", least=0, stamp=False)

    # grpo
    rewards: Mapping[str, float] = key(
        factory=dict, help='grpo: score passes whose scorers are the reward, with weights: {"rubric" = 1.0}'
    )
    group_size: int = key(8, "grpo: answers to one image, compared with each other", least=2)
    temperature: float = key(1.0, "grpo: at which answers are drawn", least=0.01, most=2)
    max_tokens: int = key(256, "grpo: tokens of an answer at most", least=1)
    kl: float = key(0.0, "grpo: pull towards the model that it began as", least=0)
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = key("dapo", "grpo: how tokens weigh; see TRL's loss_type")
    aggregate: Literal["sum", "normalise"] = key(
        "sum",
        "grpo: rewards are summed as they are, and the sum is compared within its group; or each is normalised within"
        " its group, and their sum once more over the step",
    )
    rollouts: Literal["auto", "transformers", "vllm"] = key(
        "auto", "grpo: who draws answers; auto: vllm on a GPU where it is installed", stamp=False
    )
    vllm_memory: float = key(0.3, "grpo: share of a GPU's memory for vllm", least=0.05, most=0.95, stamp=False)

    @property
    def sees(self) -> bool:
        """Whether regions are learnt, alone or besides."""
        return self.method == "regions" or self.regions > 0

    def __post_init__(self) -> None:
        owners = {name: method for method, names in KEYS.items() if method != self.method for name in names}
        for field in fields(self):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if field.name in owners and getattr(self, field.name) != default:
                whose = f'{field.name} is a key of method = "{owners[field.name]}"'
                raise ValueError(f'{whose}, and this is method = "{self.method}": remove it, or change the method')
        if self.method == "grpo":
            if not self.rewards:
                raise ValueError('method = "grpo" needs rewards, for instance rewards = { rubric = 1.0 }')
            if unfit := {name: weight for name, weight in self.rewards.items() if not 0 < weight < math.inf}:
                raise ValueError(f"rewards are {unfit}: a weight is a number above 0")
            if len(self.captions) > 1:
                raise ValueError(f"captions are {list(self.captions)}: grpo asks the words of one pass")
            if self.batch_size % self.group_size:
                raise ValueError(f"batch_size = {self.batch_size} is no multiple of group_size = {self.group_size}")
        if self.lora and (self.sees or self.optimizer == "masters"):
            raise ValueError('lora needs method = "sft" or "grpo", no regions, and optimizer = "adamw"')


KEYS = {  # that one method alone has
    "sft": ("scores", "turns", "regions"),
    "grpo": (
        "rewards",
        "group_size",
        "temperature",
        "max_tokens",
        "kl",
        "loss",
        "aggregate",
        "rollouts",
        "vllm_memory",
    ),
}
