"""Examples come from tables, are batched as the engines prompt, and are not held in memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.records import RubricCriterion
from pipeline.storage.tables import ROWS_PER_GROUP
from stages.training.collator import IGNORED, Collator
from stages.training.dataset import write_dataset
from stages.training.order import draw_batches, read_digests, split_examples
from stages.training.rewards import RubricIndex
from tests.support.runs import begin, make
from tests.support.training_runs import make_sft_sections, read_sft_examples, write_rubrics


def test_captions_become_examples(sft_run: Path) -> None:
    examples = read_sft_examples(sft_run)
    assert 50 <= len(examples) <= 60
    assert all(one.questions == ("Describe the picture.",) and len(one.answers) == 1 for one in examples)


def test_verdicts_become_examples(sft_run: Path) -> None:
    examples = read_sft_examples(sft_run, captions=["statements"], scores="labels", turns=3)
    answers = [json.loads(answer) for example in examples for answer in example.answers]
    assert all(example.questions[0].startswith("Does the sentence hold?\n") for example in examples)
    assert all(list(answer) == ["reason", "verdict"] and answer["reason"] for answer in answers)
    assert {answer["verdict"] for answer in answers} == {"yes", "no"}
    assert max(len(example.questions) for example in examples) == 3


def test_a_share_of_verdicts_is_learnt_without_reasons(sft_run: Path) -> None:
    keys: dict[str, Any] = {"captions": ["statements"], "scores": "labels"}
    full, mixed = (read_sft_examples(sft_run, **keys, reasons=share) for share in (1.0, 0.6))
    answers = [
        (json.loads(one.answers[0]), json.loads(other.answers[0])) for one, other in zip(full, mixed, strict=True)
    ]
    assert all(bare in (answer, answer["verdict"]) for answer, bare in answers)
    share = sum(isinstance(bare, dict) for _, bare in answers) / len(answers)
    assert 0.45 < share < 0.75
    assert read_sft_examples(sft_run, **keys, reasons=0.6) == mixed


@pytest.mark.parametrize(
    ("changes", "keys", "field"),
    [
        ({"score.labels": {"reasons": False}}, {"scores": "labels"}, "train.reasons: 1.0 of the verdicts are learnt"),
        ({"source": {"sign_share": 0.5}}, {"regions": 0.1}, "train.regions: the labels of image tokens"),
    ],
)
def test_what_cannot_be_learnt_is_an_error(
    tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any], field: str
) -> None:
    sections = make_sft_sections()
    for name, values in changes.items():
        sections[name] |= values
    folder = begin(tmp_path / "run", sections)
    with pytest.raises(ConfigError, match=field):
        read_sft_examples(folder, captions=["statements"], **keys)


def test_undecided_verdicts_are_learnt_if_asked_for(tmp_path: Path) -> None:
    sections = make_sft_sections(source={"num_images": 12, "broken_share": 0.0, "duplicate_share": 0.0})
    sections["engines.labeller"]["revision"] = 2
    for voice in ("stranger", "repeater"):
        sections[f"engines.{voice}"] = {"kind": "stages.scenes.teachers", "teacher": voice}
        sections[f"caption.{voice}"] = {"recipe": "scenes", "engine": voice}
    sections["score.labels"] |= {"rubric": "scenes_open", "captions": ["stranger", "repeater"]}
    folder = begin(tmp_path / "run", sections)
    for stage in ("ingest", "caption", "score"):
        assert make(folder, stage).exit_code == 0
    keys: dict[str, Any] = {"captions": ["stranger", "repeater"], "scores": "labels"}
    decided, every = (read_sft_examples(folder, **keys, unsure=unsure) for unsure in (False, True))
    answers = [json.loads(example.answers[0]) for example in every]
    assert [json.dumps(a) for a in answers if a["verdict"] != "cannot say"] == [e.answers[0] for e in decided]
    assert sum(answer["verdict"] == "cannot say" for answer in answers) == 12
    again = [e.questions[0] for e in decided if "was named before" in e.answers[0]]
    assert len(again) == 12 and all(len(question.split("```")[1].split()) > 5 for question in again)


@pytest.mark.slow
def test_copies_of_an_image_are_on_one_side_of_the_split(sft_run: Path, tmp_path: Path) -> None:
    examples = read_sft_examples(sft_run)
    train, evaluation = split_examples(read_digests(write_dataset(tmp_path / "x", examples)), num_eval_images=10)
    assert sorted([*train, *evaluation]) == list(range(len(examples)))
    held_out = {examples[number].sha256 for number in evaluation}
    assert held_out == set(sorted({example.sha256 for example in examples})[:10])
    assert not {examples[number].sha256 for number in train} & held_out


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 9))
def test_the_images_of_a_batch_have_one_size(sizes: list[int], num_batches: int, batch_size: int, seed: int) -> None:
    order = draw_batches(sizes, num_batches=num_batches, batch_size=batch_size, seed=seed)
    assert order == draw_batches(sizes, num_batches=num_batches, batch_size=batch_size, seed=seed)
    assert len(order) == num_batches * batch_size
    for start in range(0, len(order), batch_size):
        assert len({sizes[example] for example in order[start : start + batch_size]}) == 1


def test_only_answers_are_labels(sft_run: Path, processor: Any) -> None:
    examples = read_sft_examples(sft_run, captions=["statements"], scores="labels", turns=3)[:5]
    batch = Collator(processor)([vars(example) for example in examples])
    for example, labels in zip(examples, batch["labels"], strict=True):
        decoded = processor.tokenizer.decode(labels[labels != IGNORED])
        assert decoded == "".join(f"{answer}<|im_end|>\n" for answer in example.answers)


def test_the_model_is_prompted_as_by_the_engines(sft_run: Path, processor: Any) -> None:
    """The ids before the answer are the processor's own, with image tokens expanded once."""
    import torch

    example, *_ = read_sft_examples(sft_run)
    collator = Collator(processor)
    batch = collator([vars(example)])
    prompt_length = int((batch["labels"][0] == IGNORED).sum())
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.questions[0]}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    own = processor(text=[text], images=[collator.load_image(vars(example))], return_tensors="pt")
    assert batch["input_ids"][0, :prompt_length].tolist() == own["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], own["pixel_values"])
    assert torch.equal(batch["mm_token_type_ids"][0, :prompt_length], own["mm_token_type_ids"][0])


def test_an_example_without_an_image_is_prompted_by_its_text_alone(sft_run: Path, processor: Any) -> None:
    import torch

    first, second, third, *_ = read_sft_examples(sft_run)
    collator, blind = Collator(processor), replace(second, shows_image=False)
    batch = collator([vars(one) for one in (first, blind, third)])
    pair = collator([vars(first), vars(third)])
    assert torch.equal(batch["pixel_values"], pair["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], pair["image_grid_thw"])
    alone = collator([vars(blind)])
    assert "pixel_values" not in alone
    message = [{"role": "user", "content": blind.questions[0]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    own = processor.tokenizer(text, add_special_tokens=False).input_ids
    for ids, labels in ((batch["input_ids"][1], batch["labels"][1]), (alone["input_ids"][0], alone["labels"][0])):
        assert ids[: len(own)].tolist() == own
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == f"{blind.answers[0]}<|im_end|>\n"


COUNTS = (2 * ROWS_PER_GROUP, 4 * ROWS_PER_GROUP)


def measure_bytes_per_row(make: Callable[[int], object]) -> float:
    """Peak bytes of Python and Arrow that each further row takes."""
    peaks = []
    for count in (1, *COUNTS):  # the first call imports all modules
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        kept = make(count)
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        del kept
    return (peaks[2] - peaks[1]) / (COUNTS[1] - COUNTS[0])


@pytest.mark.slow
def test_examples_and_rubrics_are_not_held_in_memory(sft_run: Path, tmp_path: Path) -> None:
    example, *_ = read_sft_examples(sft_run)
    criterion = RubricCriterion(
        id="d", text="t" * 200, severity="minor", weight=1.0, agreed=1, missed=1.0, claim="c" * 200
    )

    def make_examples(count: int) -> object:
        rows = (replace(example, key=f"{i:012}", answers=(f"{i} " * 100,)) for i in range(count))
        return write_dataset(tmp_path / f"{count}.arrow", rows)

    def make_rubrics(count: int) -> object:
        return RubricIndex(tmp_path / f"rubric{count}.arrow", [tmp_path / f"{count}.parquet"])

    for count in (1, *COUNTS):
        write_rubrics(tmp_path / f"{count}.parquet", {f"{i:012}": (criterion,) * 3 for i in range(count)})
    assert measure_bytes_per_row(make_examples) < 100
    assert measure_bytes_per_row(make_rubrics) < 100
