"""Rewards are the run's scorers: they give what the score stage gives, and None where it would give none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import MachineError
from pipeline.records import Caption, Criterion, ImageRubric, RubricCriterion
from pipeline.storage import tables
from stages import scorers
from stages.text import flags
from stages.training.rewards import (
    WINDOW,
    Reward,
    RubricIndex,
    drop_incomplete,
    group_values,
    make_completion_reader,
    measure_style,
)
from tests.support.training_runs import write_rubrics

END = 2  # the token that ends an answer


def make_reward(
    run: Path, rubrics: Mapping[str, Any] | None = None, *, length_band: Sequence[int] = ()
) -> tuple[Reward, dict[str, Any]]:
    """The run's reward, and the columns that TRL passes to it for the captions of the student."""
    loaded = config.load(run)
    scorer = scorers.load_scorer(loaded.sections["score"]["committee"].scorer, run=run, field="score.committee")
    if rubrics is None:
        rubrics = {
            row.key: row.criteria for row in tables.read_rows(run / "rubric/committee/00000.parquet", ImageRubric)
        }
    captions = list(tables.read_rows(run / "caption/hasty/00000.parquet", Caption))
    columns = {
        "completions": [[{"role": "assistant", "content": row.text}] for row in captions],
        "completion_ids": [[7, END]] * len(captions),
        "key": [row.key for row in captions],
        **{name: [""] * len(captions) for name in ("alt_text", "source_key", "file", "offset", "num_bytes")},
        "texts": ["{}"] * len(captions),
    }
    read_completion = make_completion_reader(None, end_tokens={END}, max_tokens=64)
    reward = Reward(
        "committee",
        scorer,
        engines={},
        rubrics=rubrics,
        read_completion=read_completion,
        max_error_share=0.2,
        length_band=length_band,
    )
    return reward, columns


def test_a_reward_is_the_score_of_the_score_stage(grpo_run: Path) -> None:
    scored = pq.read_table(grpo_run / "score/committee/hasty/00000.parquet")["value"].to_pylist()
    reward, columns = make_reward(grpo_run)
    logged: dict[str, float] = {}
    assert reward(**columns, log_metric=logged.__setitem__) == scored
    assert logged["unscored/committee"] == 0
    assert {"met/committee/weight_3", "met/committee/weight_2"} <= set(logged)


def test_an_answer_that_cannot_be_scored_gets_no_reward(grpo_run: Path) -> None:
    reward, columns = make_reward(grpo_run, rubrics={})
    logged: dict[str, float] = {}
    assert reward(**columns, log_metric=logged.__setitem__) == [None] * len(columns["key"])
    assert logged["unscored/committee"] == 1


def test_an_answer_that_the_caption_stage_refuses_earns_nothing(grpo_run: Path) -> None:
    reward, columns = make_reward(grpo_run)
    before = reward(**columns, log_metric=lambda *_: None)
    columns["completion_ids"] = [[7, 7], *columns["completion_ids"][1:]]  # cut short
    columns["completions"] = [*columns["completions"][:-1], "A red ring. " * 40]  # loops
    logged: dict[str, float] = {}
    after = reward(**columns, log_metric=logged.__setitem__)
    assert min(value for value in before if value is not None) > 0
    assert after == [0.0, *before[1:-1], 0.0]
    assert logged["rate/unusable"] == pytest.approx(2 / len(after))


def test_an_answer_outside_the_length_band_earns_nothing(grpo_run: Path) -> None:
    plain, columns = make_reward(grpo_run)
    before = plain(**columns, log_metric=lambda *_: None)
    lengths = [len(completion[0]["content"].split()) for completion in columns["completions"]]
    least, most = min(lengths) + 1, max(lengths) - 1
    banded, _ = make_reward(grpo_run, length_band=(least, most))
    logged: dict[str, float] = {}
    after = banded(**columns, log_metric=logged.__setitem__)
    assert after == [v if least <= n <= most else 0.0 for v, n in zip(before, lengths, strict=True)]
    assert 0 < logged["rate/outside_band/committee"] < 1 and after.count(0.0) > before.count(0.0)


def test_a_reward_that_mostly_fails_ends_the_training(grpo_run: Path) -> None:
    reward, columns = make_reward(grpo_run, rubrics={})
    with pytest.raises(MachineError, match=r"score\.committee: 256 of the last 256 answers .*no rubric"):
        for _ in range(WINDOW):
            reward(**columns, log_metric=lambda *_: None)


def test_met_criteria_are_counted_by_weight_and_by_id() -> None:
    criteria = [
        Criterion(id="states_object_1", verdict="yes", value=1.0, weight=3.0, reason=None),
        Criterion(id="states_object_2", verdict="no", value=0.0, weight=3.0, reason=None),
        Criterion(id="plain", verdict=None, value=None, weight=1.0, reason=None),
    ]
    assert group_values(criteria) == {"states_object": [1.0, 0.0], "weight_3": [1.0, 0.0]}


@pytest.mark.slow
def test_an_answer_that_lacks_one_of_several_rewards_has_no_sum() -> None:
    import torch

    rewards = torch.tensor([[0.5, 0.6], [0.5, torch.nan]])
    assert torch.isnan(drop_incomplete(rewards)).tolist() == [[False, False], [True, True]]


def test_the_style_of_answers_is_measured_in_rates() -> None:
    style = measure_style(["A red star.", "This caption is accurate and complete."], flags.load("english", run=None))
    assert style["rate/self_praise"] == 0.5
    assert style["words"] == 4.5


rubric_criteria = st.builds(
    RubricCriterion, id=st.text(), text=st.text(), severity=st.just("minor"), weight=st.floats(0, 3),
    agreed=st.integers(0, 9), missed=st.floats(0, 1), claim=st.none() | st.text(),
)  # fmt: skip
keys = st.integers(0, 10**9).map(lambda i: f"{i:012}")


@pytest.mark.slow
@given(st.dictionaries(keys, st.lists(rubric_criteria, max_size=2).map(tuple)))
def test_rubrics_on_disk_are_a_mapping(
    tmp_path_factory: pytest.TempPathFactory, rubrics: dict[str, tuple[RubricCriterion, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("rubrics")
    halves = [dict(list(rubrics.items())[i::2]) for i in (0, 1)]
    files = [folder / "0.parquet", folder / "1.parquet"]
    for file, half in zip(files, halves, strict=True):
        write_rubrics(file, half)
    index = RubricIndex(folder / "all.arrow", files)
    assert dict(index) == {key: criteria for key, criteria in rubrics.items() if criteria}
    for key in (*rubrics, "", "0", "9" * 13):
        assert (key in index) == bool(rubrics.get(key)) == (index.get(key) is not None)
