"""Trains on the scores of generated answers: GRPO by TRL, rewarded by the run's own scorers.

Captions are rewarded for what they are later filtered by. A group of answers without a reward gives no gradient.

GRPO: arXiv 2402.03300, equation 3. Rubric rewards: RubiCap, arXiv 2603.09160. Several rewards, each normalised in its
group, and rewards gated by length: BalCapRL, arXiv 2605.07394.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UserError
from pipeline.execution.passes import Shard
from pipeline.sections import Run, key
from stages import scorers
from stages.scorers import Scorer
from stages.scorers._samples import prepare_given
from stages.text import flags
from stages.training import trainer
from stages.training.collator import Collator
from stages.training.dataset import TrainExample, Turn, make_example, read_images
from stages.training.prompts import check_captions, list_given_tables, load_recipe, open_prompts, slice_recipes
from stages.training.rewards import (
    Reward,
    RubricIndex,
    drop_incomplete,
    make_completion_reader,
    measure_style,
    read_text,
)
from stages.training.settings import TrainConfig
from stages.training.trainer import TrainingTask

if TYPE_CHECKING:
    import datasets
    import torch

NUM_CACHED_IMAGES = 32  # decoded; the answers of a group share one
MAX_PROMPT_TOKENS = 3072  # the image's included, so that vLLM need not reserve room for a model's whole context


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[train]` with `method = "grpo"`."""

    rewards: Mapping[str, float] = key(
        factory=dict, help='score passes whose scorers are the reward, with weights: {"rubric" = 1.0}'
    )
    group_size: int = key(8, "answers to one image, compared with each other", least=2)
    temperature: float = key(1.0, "at which answers are sampled", least=0.01, most=2)
    max_tokens: int = key(256, "the longest answer", least=1)
    kl: float = key(0.0, "weight of the KL penalty towards the initial model", least=0)
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = key("dapo", "how tokens are weighted; see TRL's loss_type")
    aggregate: Literal["sum", "normalise"] = key(
        "sum",
        "sum: rewards are summed, and sums are compared within their group; normalise: each reward is normalised within"
        " its group, and their sum over the step",
    )
    length_band: tuple[int, ...] = key(
        (), "least and most words of an answer; outside, its rewards of `banded` are 0", stamp_default=False
    )
    banded: tuple[str, ...] = key((), "the rewards that `length_band` gates; empty: all", stamp_default=False)
    rollouts: Literal["auto", "transformers", "vllm"] = key(
        "auto", "what generates answers; auto: vllm on a GPU where it is installed", stamp=False
    )
    vllm_memory: float = key(0.3, "share of a GPU's memory for vllm", least=0.05, most=0.95, stamp=False)


def check_config(config: TrainConfig) -> None:
    own: Config = config.options.config
    if not own.rewards:
        raise ValueError('method = "grpo" needs rewards, for instance rewards = { rubric = 1.0 }')
    if unfit := {name: weight for name, weight in own.rewards.items() if not 0 < weight < math.inf}:
        raise ValueError(f"rewards are {unfit}: a weight is a number above 0")
    if own.length_band and (len(own.length_band) != 2 or not 0 <= own.length_band[0] <= own.length_band[1]):
        raise ValueError(f"length_band is {list(own.length_band)}: it is two numbers of words, the lower first")
    if own.banded and not own.length_band:
        raise ValueError(f"banded is {list(own.banded)}, which needs length_band")
    if unknown := [name for name in own.banded if name not in own.rewards]:
        raise ValueError(f"banded names {unknown}, and rewards are {list(own.rewards)}")
    if len(config.captions) > 1:
        raise ValueError(f"captions are {list(config.captions)}: grpo uses the prompt of one pass")
    if config.batch_size % own.group_size:
        raise ValueError(f"batch_size = {config.batch_size} is not a multiple of group_size = {own.group_size}")
    if config.lora and config.optimizer == "masters":
        raise ValueError('lora needs optimizer = "adamw"')


def open(run: Run, config: TrainConfig) -> Grpo:
    """
    Raises:
        ConfigError: a pass, the recipe or a rubric does not exist, or vLLM is not installed.
    """
    own: Config = config.options.config
    if own.rollouts == "vllm" and not _has_vllm():
        raise ConfigError(f"{run.file}: train.rollouts", "'vllm' needs it: pip install '.[vllm]' in a clone of recap")
    check_captions(run, config, without_image=False)
    return Grpo(run, config, {name: _load_scorer(run, name) for name in own.rewards})


def _has_vllm() -> bool:
    return find_spec("vllm") is not None


def _load_scorer(run: Run, name: str) -> Scorer:
    """
    Raises:
        ConfigError: there is no such section of `[score]`, or its rubric does not exist.
    """
    known = run.sections["score"]
    if name not in known:
        raise ConfigError(f"{run.file}: train.rewards", plugins.explain_unknown(name, sorted(known)))
    scorer = scorers.load_scorer(known[name].scorer, run=run.file.parent, field=f"{run.file}: score.{name}")
    if scorer.rubric and scorer.rubric not in run.sections["rubric"]:
        message = plugins.explain_unknown(scorer.rubric, sorted(run.sections["rubric"]))
        raise ConfigError(f"{run.file}: score.{name}.rubric", message)
    return scorer


class Grpo:
    """The method `grpo`."""

    generates, learns_regions = True, False

    def __init__(self, run: Run, config: TrainConfig, scorers: Mapping[str, Scorer]) -> None:
        self._run, self._config, self._scorers = run, config, scorers
        self._own: Config = config.options.config
        self._texts = {name: prepare_given(run, name, scorer.open_fields) for name, scorer in scorers.items()}
        self.answers_per_example = self._own.group_size

    def list_tables(self) -> Sequence[str]:
        rubrics = [f"rubric/{scorer.rubric}" for scorer in self._scorers.values() if scorer.rubric]
        given = [folder for texts in self._texts.values() for folder in texts.reads]
        return list(dict.fromkeys(["image", *rubrics, *list_given_tables(self._run, self._config), *given]))

    def slice(self) -> Mapping[str, Any]:
        rewards = {
            f"score.{name}": scorer.slice(self._run, field=f"score.{name}") for name, scorer in self._scorers.items()
        }
        sections = self._run.sections["score"]
        given = {f"score.{name}.given": dict(sections[name].given) for name in self._scorers if sections[name].given}
        return {**rewards, **given, "asks": slice_recipes(self._run, self._config)}

    def read_examples(self) -> Iterator[TrainExample]:
        """The images that every reward can score.

        Raises:
            UserError: there are images, but none has the rubrics that the rewards need.
        """
        caption = self._config.captions[0]
        recipe = load_recipe(self._run, self._config, caption)
        any_image = any_usable = False
        for file, images in read_images(self._run):
            build_prompt = open_prompts(self._run, self._config, caption, file.name)
            shard = Shard(run=self._run, number=int(file.stem), pieces=())
            find_texts = {name: texts.open(shard) for name, texts in self._texts.items() if texts.fields}
            for image in images:
                any_image = True
                texts = {name: find(image.key) for name, find in find_texts.items()}
                question = build_prompt(image)
                if question is not None and all(image.key in rubrics for rubrics in self._rubrics.values()):
                    any_usable = True
                    turn = Turn(key=image.key, system=recipe.spec.system, question=question, answer="")
                    yield make_example(image, [turn], texts=texts)
        if any_image and not any_usable and not self._rubrics:
            required = ", ".join(recipe.spec.required)
            raise UserError(
                f"{self._run.file}: train.captions: no image has a text for {required}, which {caption} needs"
            )
        if any_image and not any_usable:
            missing = ", ".join(self._rubrics)
            raise UserError(
                f"{self._run.file}: train.rewards: no image has a rubric for {missing}: run `recap run rubric` first"
            )

    @cached_property
    def _rubrics(self) -> Mapping[str, RubricIndex]:
        """By reward that needs one."""
        return {
            name: RubricIndex(
                self._run.folder / trainer.FOLDER / f"rubric-{name}.arrow",
                sorted((self._run.folder / "rubric" / scorer.rubric).glob("*.parquet")),
            )
            for name, scorer in self._scorers.items()
            if scorer.rubric
        }

    def make_trainer(self, task: TrainingTask, engines: Mapping[str, Engine]) -> Any:
        recipe = load_recipe(self._run, self._config, self._config.captions[0])
        read_completion = make_completion_reader(
            recipe.answer_format,
            end_tokens=list_end_tokens(task.model, task.processor),
            max_tokens=self._own.max_tokens,
        )
        rewards = [
            Reward(
                name,
                scorer,
                engines=engines,
                rubrics=self._rubrics.get(name, {}),
                read_completion=read_completion,
                max_error_share=self._run.max_error_share,
                length_band=self._own.length_band if name in (self._own.banded or self._own.rewards) else (),
            )
            for name, scorer in self._scorers.items()
        ]
        return make_trainer(task, self._own, rewards)

    def describe(self) -> str:
        rewards, caption = ", ".join(self._own.rewards), self._config.captions[0]
        return f"by GRPO on the scores {rewards} of its own answers to the prompt of {caption}"


def make_trainer(task: TrainingTask, own: Config, rewards: Sequence[Reward]) -> Any:
    """TRL's trainer for examples that are already in order; each is answered `group_size` times."""
    from trl import GRPOTrainer

    config, model, processor = task.config, task.model, task.processor
    patterns = flags.load("english", run=None)

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        checked = False

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            tokenized = super()._tokenize_prompts(prompts)
            if not self.checked:
                check_prompt(tokenized[0][0], prompts[0], processor)
                self.checked = True
            return tokenized

        def _generate_single_turn(self, prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
            """vLLM inserts image tokens itself and would expand expanded ones again (TRL #6294)."""
            if self.use_vllm:
                prompt_ids = [collapse_image_tokens(ids, processor.image_token_id) for ids in prompt_ids]
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            """Keeps the order by size; TRL would shuffle at each evaluation."""
            from torch.utils.data import SequentialSampler

            return SequentialSampler(eval_dataset)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            """Leaves the random numbers of training as they are."""
            import torch

            with torch.random.fork_rng():
                return super().evaluate(*args, **kwargs)

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Seeds each batch by its first image, so that an evaluation does not depend on earlier ones."""
            import torch

            torch.manual_seed(config.seed + crc32(inputs[0]["key"].encode()))
            return super().prediction_step(model, inputs, *args, **kwargs)

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
            mode = "train" if self.model.training else "eval"
            for name, value in measure_style([read_text(one) for one in completions], patterns).items():
                self._metrics[mode][name].append(value)
            values: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)
            return drop_incomplete(values) if own.aggregate == "sum" else values

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            trainer.load_weights(self.model if model is None else model, Path(folder))

    made = Trainer(
        model=model,
        reward_funcs=list(rewards),
        args=_make_arguments(task, own, rewards),
        processing_class=processor,
        train_dataset=_add_prompts(task.train_data, task.collator),
        eval_dataset=None if task.eval_data is None else _add_prompts(task.eval_data, task.collator),
        peft_config=trainer.make_adapters(config),
        optimizers=(trainer.make_optimizer(task), None),
        callbacks=[trainer.make_callback(task)],
    )
    trainer.remove_printer(made)
    return made


def _make_arguments(task: TrainingTask, own: Config, rewards: Sequence[Reward]) -> Any:
    from trl import GRPOConfig

    use_vllm = own.rollouts == "vllm" or (own.rollouts == "auto" and trainer.has_gpu() and _has_vllm())
    context = task.model.config.get_text_config().max_position_embeddings
    return GRPOConfig(
        **trainer.make_arguments(task),
        gradient_checkpointing=trainer.has_gpu(),
        num_generations=own.group_size,
        num_generations_eval=1,
        max_completion_length=own.max_tokens,
        shuffle_dataset=False,
        temperature=own.temperature,
        generation_kwargs=_suppress_special_tokens(task.model, task.processor, use_vllm=use_vllm),
        beta=own.kl,
        loss_type=own.loss,
        reward_weights=[own.rewards[reward.__name__] for reward in rewards],
        multi_objective_aggregation="sum_then_normalize" if own.aggregate == "sum" else "normalize_then_sum",
        use_vllm=use_vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=own.vllm_memory,
        vllm_max_model_length=min(MAX_PROMPT_TOKENS + own.max_tokens, context),
        log_multimodal=False,
    )


def _suppress_special_tokens(model: Any, processor: Any, *, use_vllm: bool) -> dict[str, Any]:
    """Keeps special tokens out of answers: an image token in one would crash the next forward pass."""
    tokens = sorted(set(processor.tokenizer.all_special_ids) - list_end_tokens(model, processor))
    return {"logit_bias": dict.fromkeys(tokens, -100.0)} if use_vllm else {"suppress_tokens": tokens}


def list_end_tokens(model: Any, processor: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset([processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])])


def collapse_image_tokens(ids: Sequence[int], image_token: int) -> list[int]:
    """A prompt with one token for each image.

    >>> collapse_image_tokens([1, 9, 9, 9, 2], image_token=9)
    [1, 9, 2]
    """
    return [one for i, one in enumerate(ids) if one != image_token or i == 0 or ids[i - 1] != image_token]


def check_prompt(ids: Sequence[int], prompt: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """
    Raises:
        AssertionError: the trainer's tokens differ from those of the model's own processor.
    """
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    images = [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]
    own = processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()
    assert list(ids) == own, f"the trainer's prompt has {len(ids)} tokens, the processor's {len(own)}; see TRL #6294"


def _add_prompts(examples: datasets.Dataset, collator: Collator) -> datasets.Dataset:
    """The examples with image and prompt, which are made when an example is read."""

    @lru_cache(maxsize=NUM_CACHED_IMAGES)
    def load_image(file: str, offset: int, num_bytes: int) -> Any:
        return collator.load_image({"file": file, "offset": offset, "num_bytes": num_bytes})

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        places = zip(rows["file"], rows["offset"], rows["num_bytes"], strict=True)
        prompts = [_make_prompt(*texts) for texts in zip(rows["system"], rows["questions"], strict=True)]
        return {**rows, "image": [load_image(*place) for place in places], "prompt": prompts}

    return examples.with_transform(transform)


def _make_prompt(system: str, questions: Sequence[str]) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": questions[0]}]
