"""Scorers of the run as GRPO rewards, and what the curve records of them.

A reward is a section of `[score]`, called as the score stage calls it, for answers that the caption stage would call
ok. An answer that is cut short, loops or lacks its form is never kept, so it earns 0. A scorer that cannot decide gives
no reward, never 0.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.engines import Engine, Reply, Sampling, clean_reply
from pipeline.errors import MachineError
from pipeline.records import Criterion, ImageRubric, RubricCriterion, arrow_schema
from pipeline.storage import tables
from pipeline.storage.words import count_words
from stages.scorers import Sample, Scorer, ScoreResult
from stages.text import flags
from stages.text.answers import Answer, AnswerFormat, read_answer
from stages.text.repetition import find_loop
from stages.training.dataset import read_image_file, write_arrow

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

LogMetric = Callable[[str, float], None]
ReadCompletion = Callable[[str, Sequence[int]], Answer]  # from a text and its tokens
LOGGED_FLAGS = ("self_praise", "meta_commentary", "refusal")
WINDOW = 256  # answers over which the share of failed scores is measured
NUMBERED = re.compile(r"([a-z_]+?)_?\d+$")
FILE_COLUMNS = ("file", "offset", "num_bytes")
NUM_CACHED_RUBRICS = 32  # the answers of a group share one


class RubricIndex(Mapping[str, tuple[RubricCriterion, ...]]):
    """The criteria of every image that has some, by key. Only the keys are held in memory."""

    def __init__(self, path: Path, tables_to_read: Iterable[Path]) -> None:
        """
        Args:
            path: of the Arrow file to write, which is mapped into memory.
            tables_to_read: rubric tables.
        """
        import numpy as np
        import pyarrow as pa

        columns = pa.schema([arrow_schema(ImageRubric).field("key"), arrow_schema(ImageRubric).field("criteria")])
        write_arrow(path, columns, _read_usable_rubrics(tables_to_read, columns.names))
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        chunks = [np.array(chunk.to_pylist(), "S") for chunk in table["key"].chunks]
        keys = np.concatenate([np.array([], "S1"), *chunks])
        self._rows = np.argsort(keys)
        self._keys = keys[self._rows]
        self._load_criteria = lru_cache(NUM_CACHED_RUBRICS)(
            lambda row: tuple(RubricCriterion(**values) for values in table["criteria"][row].as_py())
        )

    def __getitem__(self, key: str) -> tuple[RubricCriterion, ...]:
        if key not in self:
            raise KeyError(key)
        criteria: tuple[RubricCriterion, ...] = self._load_criteria(int(self._rows[self._find(key)]))
        return criteria

    def __contains__(self, key: object) -> bool:
        place = self._find(str(key))
        return place < len(self) and bool(self._keys[place] == str(key).encode())

    def _find(self, key: str) -> int:
        return int(self._keys.searchsorted(key.encode()))

    def __iter__(self) -> Iterator[str]:
        return (key.decode() for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _read_usable_rubrics(files: Iterable[Path], columns: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.compute as pc

    for file in files:
        for batch in tables.read_batches(file, ImageRubric):
            yield batch.filter(pc.equal(batch["status"], "ok")).select(columns)


class Reward:
    """A scorer as TRL calls a reward: a value for each answer, None where the scorer cannot decide."""

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        *,
        engines: Mapping[str, Engine],
        rubrics: Mapping[str, tuple[RubricCriterion, ...]],
        read_completion: ReadCompletion,
        max_error_share: float,
        length_band: Sequence[int] = (),
    ) -> None:
        """
        Args:
            name: of the section in `[score]`.
            rubrics: by key, the criteria of an image's own rubric, for a scorer that needs one.
            read_completion: reads an answer as the caption stage would.
            max_error_share: [0, 1]; training fails when a larger share of the last answers could not be scored.
            length_band: least and most words of an answer that earns something; empty: any number.
        """
        self.__name__ = name
        self._scorer, self._engines, self._rubrics, self._read_completion = scorer, engines, rubrics, read_completion
        self._length_band = length_band
        self._max_error_share, self._last_errors = max_error_share, deque[str | None](maxlen=WINDOW)

    def __call__(
        self,
        *,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        key: Sequence[str],
        log_metric: LogMetric,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """
        Raises:
            MachineError: too many answers could not be scored.
        """
        answers = [
            self._read_completion(read_text(completion), ids)
            for completion, ids in zip(completions, completion_ids, strict=True)
        ]
        samples = [
            Sample(
                key=key[number],
                candidate=number,
                text=answer.text,
                alt_text=columns["alt_text"][number],
                source_key=columns["source_key"][number],
                data=partial(read_image_file, {name: columns[name][number] for name in FILE_COLUMNS}),
                texts=json.loads(columns["texts"][number]).get(self.__name__, {}),
                rubric_criteria=self._rubrics.get(key[number]),
            )
            for number, answer in enumerate(answers)
            if answer.status == "ok"
        ]
        scored = self._scorer.score(samples, self._engines)
        results = {sample.candidate: result for sample, result in zip(samples, scored, strict=True)}
        log_metric("rate/unusable", 1 - len(samples) / len(answers))
        self._log(list(results.values()), log_metric)
        self._check_errors(results.values())
        fits = [self._fits_band(answer.text) for answer in answers]
        if self._length_band:
            log_metric(f"rate/outside_band/{self.__name__}", 1 - fmean(fits))
        return [results[number].value if number in results and fits[number] else 0.0 for number in range(len(answers))]

    def _fits_band(self, text: str) -> bool:
        return not self._length_band or self._length_band[0] <= count_words(text) <= self._length_band[1]

    def _log(self, results: Sequence[ScoreResult], log_metric: LogMetric) -> None:
        if results:
            log_metric(f"unscored/{self.__name__}", fmean(result.value is None for result in results))
        for name, values in group_values(criterion for result in results for criterion in result.criteria).items():
            log_metric(f"met/{self.__name__}/{name}", fmean(values))

    def _check_errors(self, results: Iterable[ScoreResult]) -> None:
        """Without this check, a judge that never answers would train nothing for days and leave a model in the end."""
        self._last_errors.extend(result.error or result.status if result.value is None else None for result in results)
        errors = [error for error in self._last_errors if error is not None]
        if len(self._last_errors) == WINDOW and len(errors) > self._max_error_share * WINDOW:
            commonest, count = Counter(errors).most_common(1)[0]
            raise MachineError(
                f"score.{self.__name__}: {len(errors)} of the last {WINDOW} answers could not be scored, more than"
                f" max_error_share = {self._max_error_share}; most often ({count} times): {commonest}"
            )


def group_values(criteria: Iterable[Criterion]) -> dict[str, list[float]]:
    """The values of criteria by weight, and by id where ids are numbered: `states_object` for `states_object_3`."""
    groups: dict[str, list[float]] = {}
    for criterion in criteria:
        if criterion.value is not None:
            groups.setdefault(f"weight_{criterion.weight:g}", []).append(criterion.value)
            if numbered := NUMBERED.match(criterion.id):
                groups.setdefault(numbered[1], []).append(criterion.value)
    return dict(sorted(groups.items()))


def read_text(completion: Any) -> str:
    """The text of an answer: a string, or a conversation of one message."""
    return (completion if isinstance(completion, str) else str(completion[0]["content"])).strip()


def make_completion_reader(
    form: AnswerFormat | None, *, end_tokens: Collection[int], max_tokens: int
) -> ReadCompletion:
    """A function that reads an answer as the caption stage reads an engine's reply.

    Args:
        form: of the recipe that prompts the model.
        end_tokens: an answer whose last token is none of them was cut short.
    """
    sampling = Sampling(max_tokens=max_tokens)

    def read(text: str, ids: Sequence[int]) -> Answer:
        ended = bool(ids) and ids[-1] in end_tokens
        return read_answer(
            clean_reply(Reply(text=text, finish_reason="stop" if ended else "length", sampling=sampling)), form
        )

    return read


def measure_style(texts: Sequence[str], patterns: flags.Patterns) -> dict[str, float]:
    """Rates of how answers are worded. A change in them shows that a reward is being gamed."""
    found = [flags.find_flags(text, patterns) for text in texts]
    rates = {f"rate/{name}": fmean(name in names for names in found) for name in LOGGED_FLAGS if name in patterns}
    return {
        **rates,
        "rate/repetition": fmean(bool(find_loop(text)) for text in texts),
        "words": fmean(count_words(text) for text in texts),
    }


def drop_incomplete(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards, answers by functions; NaN in all of an answer's when one is missing, which a sum would count as 0."""
    import torch

    return rewards.masked_fill(torch.isnan(rewards).any(dim=1, keepdim=True), torch.nan)
