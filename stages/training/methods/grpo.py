"""Decides how a model learns from the scores of its own answers: GRPO, by TRL, with the run's own scorers as reward.

What is filtered on is what is trained on: a reward is a section of `[score]`, called as the score stage calls it, for
answers that the caption stage would call ok; one that was cut, loops or has not its form is never kept, and earns 0. A
scorer that cannot say gives no reward, never 0; a group without a reward gives no gradient.

GRPO: arXiv 2402.03300, equation 3. Rubric rewards: RubiCap, arXiv 2603.09160.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from zlib import crc32

from pipeline.engines import Engine, Reply, Sampling
from pipeline.errors import MachineError
from pipeline.records import Criterion, RubricCriterion
from stages import flags
from stages.scorers import Sample, Scorer, ScoreResult
from stages.text import answers
from stages.text.answers import Answer, AnswerFormat
from stages.text.repetition import find_loop
from stages.training import trainer
from stages.training.dataset import Collator
from stages.training.trainer import TrainingTask

if TYPE_CHECKING:
    import datasets
    import torch

Log = Callable[[str, float], None]
Read = Callable[[str, Sequence[int]], Answer]  # from a text and its tokens
WATCHED = ("self_praise", "meta_commentary", "refusal")  # flags whose rates stand on the curve
KEPT_PICTURES = 32  # decoded, for the answers of one group ask for one picture
PROMPT_TOKENS = 3072  # at most, the picture's included: vllm need not hold room for a model's whole context
SETTLED = 256  # answers after which the share of those that could not be scored tells
NUMBERED = re.compile(r"([a-z_]+?)_?\d+$")


class Reward:
    """A scorer as TRL calls a reward: a value for each answer, None where nobody can say."""

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        *,
        engines: Mapping[str, Engine],
        data: Callable[[Mapping[str, Any]], bytes],
        asked: Mapping[str, tuple[RubricCriterion, ...]],
        read: Read,
        max_error_share: float,
    ) -> None:
        """
        Args:
            name: of the section in `[score]`.
            data: the image file of a lesson.
            asked: of each key, the criteria of its own rubric, for a scorer that reads one.
            read: what the caption stage makes of an answer.
            max_error_share: [0, 1]; when of the last answers more could not be scored, the training ends.
        """
        self.__name__ = name
        self._max_error_share, self._failed = max_error_share, deque[str | None](maxlen=SETTLED)
        self._scorer, self._engines, self._data, self._asked, self._read = scorer, engines, data, asked, read

    def __call__(
        self,
        *,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        key: Sequence[str],
        log_metric: Log,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """
        Raises:
            MachineError: too many answers could not be scored.
        """
        read = [self._read(text_of(said), ids) for said, ids in zip(completions, completion_ids, strict=True)]
        samples = [
            Sample(
                key=key[number],
                candidate=number,
                text=answer.text,
                alt_text=columns["alt_text"][number],
                source_key=columns["source_key"][number],
                data=partial(self._data, {name: columns[name][number] for name in ("file", "offset", "num_bytes")}),
                rubric_criteria=self._asked.get(key[number]),
            )
            for number, answer in enumerate(read)
            if answer.status == "ok"
        ]
        given = self._scorer.score(samples, self._engines)
        marks = {sample.candidate: mark for sample, mark in zip(samples, given, strict=True)}
        log_metric("rate/unusable", 1 - len(samples) / len(read))
        self._tell(list(marks.values()), log_metric)
        self._check(marks.values())
        return [marks[number].value if number in marks else 0.0 for number in range(len(read))]

    def _tell(self, marks: Sequence[ScoreResult], log_metric: Log) -> None:
        """How often criteria are met, by what they weigh and by their sort, and how many marks failed."""
        if marks:
            log_metric(f"unscored/{self.__name__}", fmean(mark.value is None for mark in marks))
        for name, values in breakdown(criterion for mark in marks for criterion in mark.criteria).items():
            log_metric(f"met/{self.__name__}/{name}", fmean(values))

    def _check(self, marks: Iterable[ScoreResult]) -> None:
        """A judge that never answers would otherwise train nothing for days, and leave a model in the end."""
        self._failed.extend(mark.error or mark.status if mark.value is None else None for mark in marks)
        failed = [why for why in self._failed if why is not None]
        if len(self._failed) == SETTLED and len(failed) > self._max_error_share * SETTLED:
            commonest, num = Counter(failed).most_common(1)[0]
            raise MachineError(
                f"score.{self.__name__}: {len(failed)} of the last {SETTLED} answers could not be scored, more than"
                f" max_error_share = {self._max_error_share}; most often ({num} times): {commonest}"
            )


def breakdown(criteria: Iterable[Criterion]) -> dict[str, list[float]]:
    """The values of criteria by weight, and by id where ids are numbered: `states_object` for `states_object_3`."""
    found: dict[str, list[float]] = {}
    for criterion in criteria:
        if criterion.value is not None:
            found.setdefault(f"weight_{criterion.weight:g}", []).append(criterion.value)
            if sort := NUMBERED.match(criterion.id):
                found.setdefault(sort[1], []).append(criterion.value)
    return dict(sorted(found.items()))


def text_of(completion: Any) -> str:
    """What was said: a string, or the content of the one message that a conversation was answered with."""
    return (completion if isinstance(completion, str) else str(completion[0]["content"])).strip()


def reader(form: AnswerFormat | None, *, ends: Collection[int], max_tokens: int) -> Read:
    """How an answer is read: as the caption stage reads the same reply of an engine.

    Args:
        form: of the recipe that was asked.
        ends: tokens that end an answer; one without was cut.
    """
    sampling = Sampling(max_tokens=max_tokens)

    def read(text: str, ids: Sequence[int]) -> Answer:
        ended = bool(ids) and ids[-1] in ends
        return answers.read_answer(
            Reply(text=text, finish_reason="stop" if ended else "length", sampling=sampling), form
        )

    return read


def manners(texts: Sequence[str], patterns: flags.Patterns) -> dict[str, float]:
    """How answers are worded, whatever they say: what gives away that a reward is played."""
    noticed = [flags.find_flags(text, patterns) for text in texts]
    rates = {f"rate/{name}": fmean(name in found for found in noticed) for name in WATCHED if name in patterns}
    return {
        **rates,
        "rate/repetition": fmean(bool(find_loop(text)) for text in texts),
        "words": fmean(len(text.split()) for text in texts),
    }


def make_trainer(task: TrainingTask, rewards: Sequence[Reward]) -> Any:
    """TRL's trainer, for lessons that are already in order: each is answered `group_size` times."""
    from trl import GRPOConfig, GRPOTrainer

    config, model, processor = task.config, task.model, task.processor
    patterns = flags.load("english", run=None)

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        checked = False

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            given = super()._tokenize_prompts(prompts)
            if not self.checked:
                check_prompt(given[0][0], prompts[0], processor)
                self.checked = True
            return given

        def _generate_single_turn(self, prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
            """vLLM puts a picture's tokens in itself: what is expanded already would be expanded twice (TRL #6294)."""
            if self.use_vllm:
                prompt_ids = [unexpanded(ids, processor.image_token_id) for ids in prompt_ids]
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            """As they are ordered, by size, where TRL draws another order at each evaluation."""
            from torch.utils.data import SequentialSampler

            return SequentialSampler(eval_dataset)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            """Without a change to the draws of training."""
            import torch

            with torch.random.fork_rng():
                return super().evaluate(*args, **kwargs)

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """By the same draws for the same images, whatever this process has drawn before."""
            import torch

            torch.manual_seed(config.seed + crc32(inputs[0]["key"].encode()))
            return super().prediction_step(model, inputs, *args, **kwargs)

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
            mode = "train" if self.model.training else "eval"
            for name, value in manners([text_of(one) for one in completions], patterns).items():
                self._metrics[mode][name].append(value)
            given: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)
            return complete(given) if config.aggregate == "sum" else given

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            trainer.reload(self.model if model is None else model, Path(folder))

    by_vllm = config.rollouts == "vllm" or (config.rollouts == "auto" and trainer.has_gpu() and _has_vllm())
    args = GRPOConfig(
        **trainer.arguments(task),
        gradient_checkpointing=trainer.has_gpu(),
        num_generations=config.group_size,
        num_generations_eval=1,
        max_completion_length=config.max_tokens,
        shuffle_dataset=False,
        temperature=config.temperature,
        generation_kwargs=_never(model, processor, by_vllm=by_vllm),
        beta=config.kl,
        loss_type=config.loss,
        reward_weights=[config.rewards[reward.__name__] for reward in rewards],
        multi_objective_aggregation="sum_then_normalize" if config.aggregate == "sum" else "normalize_then_sum",
        use_vllm=by_vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=config.vllm_memory,
        vllm_max_model_length=min(
            PROMPT_TOKENS + config.max_tokens, model.config.get_text_config().max_position_embeddings
        ),
        log_multimodal=False,
    )
    made = Trainer(
        model=model,
        reward_funcs=list(rewards),
        args=args,
        processing_class=processor,
        train_dataset=_shown(task.learnt, task.collator),
        eval_dataset=None if task.measured is None else _shown(task.measured, task.collator),
        peft_config=trainer.adapters(config),
        optimizers=(trainer.optimizer(task), None),
        callbacks=[trainer.keeper(task)],
    )
    return trainer.quiet(made)


def complete(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards, answers by functions, without the answers that lack one: in a sum it would count as 0."""
    import torch

    return rewards.masked_fill(torch.isnan(rewards).any(dim=1, keepdim=True), torch.nan)


def unexpanded(ids: Sequence[int], image_token: int) -> list[int]:
    """A prompt with one token for each picture.

    >>> unexpanded([1, 9, 9, 9, 2], image_token=9)
    [1, 9, 2]
    """
    return [one for i, one in enumerate(ids) if one != image_token or i == 0 or ids[i - 1] != image_token]


def check_prompt(ids: Sequence[int], prompt: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """
    Raises:
        AssertionError: the trainer asks otherwise than the model's own processor would.
    """
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    pictures = [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]
    own = processor(text=[text], images=pictures, return_tensors="pt")["input_ids"][0].tolist()
    assert list(ids) == own, f"the trainer's prompt has {len(ids)} tokens, the processor's {len(own)}; see TRL #6294"


def _shown(taught: datasets.Dataset, collator: Collator) -> datasets.Dataset:
    """With the picture and the prompt, made when a lesson is taken."""

    @lru_cache(maxsize=KEPT_PICTURES)
    def picture(file: str, offset: int, num_bytes: int) -> Any:
        return collator.picture({"file": file, "offset": offset, "num_bytes": num_bytes})

    def show(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        places = zip(rows["file"], rows["offset"], rows["num_bytes"], strict=True)
        prompts = [_prompt(*said) for said in zip(rows["system"], rows["questions"], strict=True)]
        return {**rows, "image": [picture(*place) for place in places], "prompt": prompts}

    return taught.with_transform(show)


def _prompt(system: str, questions: Sequence[str]) -> list[dict[str, str]]:
    told = [{"role": "system", "content": system}] if system else []
    return [*told, {"role": "user", "content": questions[0]}]


def ending(model: Any, processor: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset([processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])])


def _never(model: Any, processor: Any, *, by_vllm: bool) -> dict[str, Any]:
    """Keeps special tokens out of answers: an image token that was drawn would crash the next forward pass."""
    never = sorted(set(processor.tokenizer.all_special_ids) - ending(model, processor))
    return {"logit_bias": dict.fromkeys(never, -100.0)} if by_vllm else {"suppress_tokens": never}


def _has_vllm() -> bool:
    return find_spec("vllm") is not None
