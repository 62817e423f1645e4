"""The promises of training: lessons come from tables, only answers are learnt, and a kill changes nothing."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.engines import Request, Sampling
from pipeline.engines import transformers as engines
from pipeline.records import ImageRubric, RubricCriterion, Step
from pipeline.storage import tables as tables_of
from stages import train
from stages.training import dataset
from stages.training.curve import points
from stages.training.dataset import IGNORED, Collator, TrainExample, arranged, digests, held_out, lessons
from stages.training.settings import Config
from tests.support.runs import begin, make


def sections(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run on scenes whose captions come from a teacher, and whose statements are labelled."""
    made: dict[str, dict[str, Any]] = {
        "source": {"kind": "scenes", "num_images": 60, "seed": 7, "shard_size": 30},
        "engines.hasty": {"kind": "stages.scenes.teachers", "teacher": "hasty"},
        "engines.speaker": {"kind": "stages.scenes.teachers", "teacher": "speaker"},
        "engines.labeller": {"kind": "stages.scenes.teachers", "teacher": "labeller"},
        "caption.main": {"recipe": "scenes", "engine": "hasty"},
        "caption.statements": {"recipe": "scenes", "engine": "speaker", "num_candidates": 3, "temperature": 1.0},
        "score.labels": {"kind": "judge", "engine": "labeller", "rubric": "scenes", "captions": ["statements"]},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "eval_images": 6,
            "save_steps": 2,
            "eval_steps": 3,
            "log_steps": 1,
            "optimizer": "masters",
            "learning_rate": 1e-3,
            "num_workers": 0,
        },
    }
    for name, values in changes.items():
        made[name] = {**made[name], **values}
    return made


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = begin(tmp_path_factory.mktemp("lessons") / "run", sections())
    for what in ("ingest", "caption", "score"):
        assert make(folder, what).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def processor() -> Any:
    from stages.scenes import tiny_model

    return tiny_model.create_processor()


def taught(folder: Path, **settings: Any) -> list[TrainExample]:
    return list(lessons(config.load(folder), Config(**settings)))


def test_captions_become_lessons(tables: Path) -> None:
    found = taught(tables)
    assert 50 <= len(found) <= 60
    assert all(lesson.questions == ("Describe the picture.",) and len(lesson.answers) == 1 for lesson in found)


def test_verdicts_become_lessons(tables: Path) -> None:
    found = taught(tables, captions=("statements",), scores="labels", turns=3)
    answers = [json.loads(answer) for lesson in found for answer in lesson.answers]
    assert all(lesson.questions[0].startswith("Does the sentence hold?\n") for lesson in found)
    assert all(list(answer) == ["reason", "verdict"] and answer["reason"] for answer in answers)
    assert {answer["verdict"] for answer in answers} == {"yes", "no"}
    assert max(len(lesson.questions) for lesson in found) == 3


def test_copies_are_on_one_side(tables: Path, tmp_path: Path) -> None:
    found = taught(tables)
    learnt, measured = held_out(digests(dataset.on_disk(tmp_path / "x", found, TrainExample)), num_images=10)
    assert sorted([*learnt, *measured]) == list(range(len(found)))
    measured_on = {found[number].sha256 for number in measured}
    assert measured_on == set(sorted({lesson.sha256 for lesson in found})[:10])
    assert not {found[number].sha256 for number in learnt} & measured_on


NUMBERS = (2 * tables_of.ROWS_PER_GROUP, 4 * tables_of.ROWS_PER_GROUP)


def grown(make: Callable[[int], object]) -> float:
    """Bytes of Python and Arrow that each row more takes, at the peak."""
    peaks = []
    for num in (1, *NUMBERS):  # the first imports what there is to import
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        kept = make(num)
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        del kept
    return (peaks[2] - peaks[1]) / (NUMBERS[1] - NUMBERS[0])


@pytest.mark.slow
def test_lessons_and_rubrics_are_not_held_in_memory(tables: Path, tmp_path: Path) -> None:
    lesson, *_ = taught(tables)
    demand = RubricCriterion(
        id="d", text="t" * 200, severity="minor", weight=1.0, agreed=1, missed=1.0, claim="c" * 200
    )

    def made(num: int) -> object:
        rows = (replace(lesson, key=f"{i:012}", answers=(f"{i} " * 100,)) for i in range(num))
        return dataset.on_disk(tmp_path / f"{num}.arrow", rows, TrainExample)

    def asked(num: int) -> object:
        return dataset.Rubrics(tmp_path / f"rubric{num}.arrow", [tmp_path / f"{num}.parquet"])

    for num in (1, *NUMBERS):
        write_rubrics(tmp_path / f"{num}.parquet", {f"{i:012}": (demand,) * 3 for i in range(num)})
    assert grown(made) < 100
    assert grown(asked) < 100


def write_rubrics(path: Path, asked: dict[str, tuple[RubricCriterion, ...]]) -> None:
    about: dict[str, Any] = {"name": "r", "error": None, "num_teachers": 1, "writer": "claims"}
    rows = (
        ImageRubric(key=key, status="ok" if criteria else "empty", criteria=criteria, **about)
        for key, criteria in asked.items()
    )
    tables_of.write_rows(
        path, ImageRubric, rows, tables_of.Provenance(stage="rubric", name="r", version=1, slice={}, inputs={})
    )


demands = st.builds(
    RubricCriterion, id=st.text(), text=st.text(), severity=st.just("minor"), weight=st.floats(0, 3),
    agreed=st.integers(0, 9), missed=st.floats(0, 1), claim=st.none() | st.text(),
)  # fmt: skip


@given(st.dictionaries(st.integers(0, 10**9).map(lambda i: f"{i:012}"), st.lists(demands, max_size=2).map(tuple)))
def test_rubrics_on_disk_are_a_mapping(
    tmp_path_factory: pytest.TempPathFactory, asked: dict[str, tuple[RubricCriterion, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("rubrics")
    some, others = (dict(list(asked.items())[i::2]) for i in (0, 1))
    write_rubrics(folder / "0.parquet", some)
    write_rubrics(folder / "1.parquet", others)
    found = dataset.Rubrics(folder / "all.arrow", [folder / "0.parquet", folder / "1.parquet"])
    assert dict(found) == {key: criteria for key, criteria in asked.items() if criteria}
    for key in (*asked, "", "0", "9" * 13):
        assert (key in found) == bool(asked.get(key)) == (found.get(key) is not None)


def test_only_answers_are_labels(tables: Path, processor: Any) -> None:
    found = taught(tables, captions=("statements",), scores="labels", turns=3)[:5]
    batch = Collator(processor)([vars(lesson) for lesson in found])
    for lesson, labels in zip(found, batch["labels"], strict=True):
        learnt = processor.tokenizer.decode(labels[labels != IGNORED])
        assert learnt == "".join(f"{answer}<|im_end|>\n" for answer in lesson.answers)


def test_the_model_is_asked_as_the_engines_ask(tables: Path, processor: Any) -> None:
    """The ids before the answer are those of the processor's own way, image tokens once."""
    (lesson,) = taught(tables)[:1]
    collator = Collator(processor)
    batch = collator([vars(lesson)])
    before = int((batch["labels"][0] == IGNORED).sum())
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": lesson.questions[0]}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    own = processor(text=[text], images=[collator.picture(vars(lesson))], return_tensors="pt")
    assert batch["input_ids"][0, :before].tolist() == own["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], own["pixel_values"])
    assert torch.equal(batch["mm_token_type_ids"][0, :before], own["mm_token_type_ids"][0])


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 9))
def test_a_batch_has_images_of_one_size(sizes: list[int], num_batches: int, batch_size: int, seed: int) -> None:
    order = arranged(sizes, num_batches=num_batches, batch_size=batch_size, seed=seed)
    assert order == arranged(sizes, num_batches=num_batches, batch_size=batch_size, seed=seed)
    assert len(order) == num_batches * batch_size
    for start in range(0, len(order), batch_size):
        assert len({sizes[lesson] for lesson in order[start : start + batch_size]}) == 1


@given(st.text(max_size=60))
def test_the_small_tokenizer_loses_nothing(processor: Any, text: str) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_world_are_single_tokens(processor: Any) -> None:
    text = '{"reason": "no small dotted purple triangle", "verdict": "yes"}'
    assert len(processor.tokenizer(text).input_ids) <= 9


def test_points_are_in_order_and_single() -> None:
    log = [{"step": 2, "loss": 1.0, "epoch": 0.1}, {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 3.0, "loss": 1.0}]
    assert points(log) == [
        Step(step=1, name="loss", value=2.0),
        Step(step=2, name="eval_loss", value=3.0),
        Step(step=2, name="loss", value=1.0),
    ]


def test_masters_keep_what_16_bits_lose() -> None:
    from torch import nn

    from stages.training.optimizer import MixedPrecisionMuon

    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64)).bfloat16()
    optimizer = MixedPrecisionMuon(model, lr=1e-6, weight_decay=0.0)
    before = model[0].weight.detach().float().clone()
    for _ in range(3):
        model(torch.arange(8)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masters = {name: optimizer.state[p]["master"] for name, p in model.named_parameters()}
    assert all(master.dtype == torch.float32 for master in masters.values())
    assert not torch.equal(masters["0.weight"], before)
    again = MixedPrecisionMuon(model, lr=1e-6, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(again.state[p]["master"], masters[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tables: Path, tmp_path: Path) -> None:
    """Its checkpoint after step 4 is all that is left; the model and the curve come out the same."""
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        shutil.copytree(tables, folder)
        folders.append(folder)
        train.make(config.load(folder), {})
    whole, killed = folders
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "train" / "checkpoint-6")
    (killed / "train" / "checkpoint-9").mkdir()  # cut short
    (killed / "train" / ".lessons.arrow.0.tmp").touch()  # too
    train.make(config.load(killed), {})
    assert (whole / "model/model.safetensors").read_bytes() == (killed / "model/model.safetensors").read_bytes()
    assert "held-out" in (killed / "model/README.md").read_text()
    assert not [file for folder in folders for file in (folder / "train").glob("*.arrow*")]


@pytest.mark.slow
def test_what_was_trained_is_an_engine(tables: Path, tmp_path: Path, processor: Any) -> None:
    """The model folder answers through an engine, after learning regions too."""
    parts = sections(train={"regions": 1.0, "steps": 3})
    folder = tmp_path / "run"
    shutil.copytree(tables, folder)
    begin(folder, parts)
    output = train.make(config.load(folder), {})
    engine = engines.open(engines.Config(model=str(output)))
    lesson = taught(folder)[0]
    request = Request(
        id="x",
        prompt=lesson.questions[0],
        images=(Collator(processor).data(vars(lesson)),),
        ladder=(Sampling(max_tokens=5),),
    )
    (reply,) = engine.generate([request])
    engine.close()
    assert (reply.error, reply.num_output_tokens) == (None, 5)
    assert not any("region" in name for name in _weights(output))
    assert json.loads((output / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1, "others may read one file and not another"


def _weights(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", ["scenes-base", "scenes-judge", "scenes-captioner-sft"])
def test_the_manifests_of_the_models_are_valid(name: str, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent.parent.parent / "manifests" / name / "run.toml", tmp_path / "run.toml")
    run = config.load(tmp_path)
    settings = run.sections["train"][""]
    assert set(settings.captions) <= {*run.sections["caption"], "main"}
    assert settings.scores in {"", *run.sections["score"]}
