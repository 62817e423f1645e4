"""GRPO: what `[train]` refuses, that a group without rewards moves nothing, and that a training resumes or is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import config, plugins
from pipeline.errors import RefusedError, StoppedError, UserError
from pipeline.execution.run_state import RunState
from stages import train
from stages.training.methods import grpo
from stages.training.methods.grpo import check_prompt, collapse_image_tokens
from stages.training.rewards import Reward
from tests.support.runs import ROOT, begin, recap
from tests.support.training_runs import TEACHERS, make_grpo_sections

METHODS = ", ".join(plugins.list_names("stages.training.methods"))


def copy_run(run: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(run, to)
    return begin(to, make_grpo_sections(**changes))


def test_a_prompt_whose_image_tokens_are_expanded_twice_is_refused(processor: Any) -> None:
    image = Image.new("RGB", (96, 96))
    prompt = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    ids = processor(text=[text], images=[image], return_tensors="pt")["input_ids"][0].tolist()
    check_prompt(ids, prompt, processor)
    doubled = [one for i in ids for one in ([i, i] if i == processor.image_token_id else [i])]
    with pytest.raises(AssertionError, match="6294"):
        check_prompt(doubled, prompt, processor)
    once = collapse_image_tokens(ids, processor.image_token_id)
    assert once.count(processor.image_token_id) == 1
    assert [i for i in once if i != processor.image_token_id] == [i for i in ids if i != processor.image_token_id]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "needs rewards"),
        ({"rewards": {"comittee": 1.0}}, "comittee"),
        ({"batch_size": 3}, "group_size"),
        ({"method": "sft"}, 'train.[a-z_]+: is a key of method = "grpo", and this is method = "sft"'),
        ({"turns": 2}, 'train.turns: is a key of method = "sft", and this is method = "grpo"'),
        ({"turn": 2}, "train.turn: unknown key"),
        ({"method": "gpro"}, f"train.method: 'gpro' is none of {METHODS}; did you mean 'grpo'"),
        ({"lora": 4}, "lora needs"),
        ({"rewards": {"committee": 0.0}}, "a weight is a number above 0"),
        ({"rewards": {"committee": float("nan")}}, "a weight is a number above 0"),
        ({"length_band": [9]}, "length_band is .9.: it is two numbers of words, the lower first"),
        ({"length_band": [9, 3]}, "length_band is .9, 3.: it is two numbers"),
        ({"banded": ["committee"]}, "banded is .*, which needs length_band"),
        ({"length_band": [3, 9], "banded": ["comittee"]}, "banded names .'comittee'., and rewards are .'committee'."),
        ({"captions": ["hasty", "warm"]}, "grpo uses the prompt of one pass"),
        ({"model": "/nowhere/model"}, "run.toml: train.model: '/nowhere/model' does not load"),
        ({"recipe": "scene"}, "run.toml: train.recipe: 'scene' is none of .*did you mean 'scenes'"),
        ({"captions": ["hastie"]}, "hastie"),
        ({"eval_images": 16}, "eval_images"),
    ],
)
def test_an_error_names_the_key_of_train(grpo_run: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.make(config.load(copy_run(grpo_run, tmp_path / "run", **changes)), {})


def test_an_error_names_a_package_that_is_not_installed(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run.toml: train.rollouts: .*pip install '\.\[vllm\]'"):
        train.make(config.load(copy_run(grpo_run, tmp_path / "run", rollouts="vllm")), {})
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run.toml: train: needs trl: pip install '\.\[train\]'"):
        train.make(config.load(grpo_run), {})


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("rubric", "no image has a rubric for committee: run `recap run rubric` first"),
        ("image", "nothing usable in image"),
    ],
)
def test_an_error_names_the_missing_tables(grpo_run: Path, tmp_path: Path, folder: str, message: str) -> None:
    shutil.rmtree(copy_run(grpo_run, tmp_path / "run") / folder)
    with pytest.raises(UserError, match=message):
        train.make(config.load(tmp_path / "run"), {})


@pytest.mark.slow
def test_stale_or_incomplete_tables_are_refused(grpo_run: Path, tmp_path: Path) -> None:
    folder = copy_run(grpo_run, tmp_path / "run")
    loaded = config.load(folder)
    assert train.reads(loaded) == ["image", "rubric/committee"]
    RunState(loaded).check_done(train.reads(loaded))
    begin(
        folder,
        {**make_grpo_sections(), "rubric.committee": {"teachers": list(TEACHERS), "student": "hasty", "agree": 3}},
    )
    done = recap("run", "train", "--run", folder, check=False)
    assert done.returncode == 2 and "rubric:committee: 1 of 1 shards" in done.stderr, done.stderr
    assert "stale: agree: 0 -> 3" in done.stderr and "recap run rubric:committee --stale redo" in done.stderr
    begin(folder, make_grpo_sections())
    (folder / "image/00000.parquet").unlink()
    with pytest.raises(
        RefusedError,
        match=r"ingest: 1 of 1 shards are not up to date .* missing; make them with `recap run ingest",
    ):
        RunState(loaded).check_done(train.reads(loaded))
    RunState(loaded, stale="keep").check_done(train.reads(loaded))


# A reward that differs between answers, whatever they claim.
FORM = {"rewards": {"form": 1.0}, "learning_rate": 1e-2}


@pytest.mark.slow
def test_groups_without_a_reward_change_no_weight(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copy_run(grpo_run, tmp_path / "moved", **FORM, steps=2, eval_images=0)
    train.make(config.load(moved), {})
    monkeypatch.setattr(Reward, "__call__", lambda _, *, completions, **__: [None] * len(completions))
    still = copy_run(grpo_run, tmp_path / "still", **FORM, steps=2, eval_images=0)
    train.make(config.load(still), {})
    assert max(read_curve(moved, "grad_norm")) > 0
    assert set(read_curve(still, "grad_norm")) == {0.0}


@pytest.mark.slow
def test_a_killed_training_resumes_with_the_same_result(grpo_run: Path, tmp_path: Path) -> None:
    """It resumes after the evaluation at step 2 with the same order, random numbers, optimizer and curve."""
    settings: dict[str, Any] = {"optimizer": "adamw", "lora": 4}  # the other optimizer is in test_train.py
    start, whole, killed = (
        copy_run(grpo_run, tmp_path / name, **FORM, eval_steps=2, **settings) for name in ("start", "whole", "killed")
    )
    begin(start, make_grpo_sections(**{**FORM, **settings, "learning_rate": 0.0}, steps=1))
    for folder in (start, whole, killed):
        train.make(config.load(folder), {})
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "train" / "checkpoint-4")
    train.make(config.load(killed), {})
    assert read_weights(start) != read_weights(whole) == read_weights(killed)
    assert read_curve(whole, "reward") == read_curve(killed, "reward")
    assert read_curve(whole, "eval_reward") == read_curve(killed, "eval_reward")


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint(grpo_run: Path, tmp_path: Path) -> None:
    stopped, whole = (copy_run(grpo_run, tmp_path / name, **FORM) for name in ("stopped", "whole"))
    stop = Event()
    stop.set()
    with pytest.raises(StoppedError):
        train.make(config.load(stopped), {}, stop=stop)
    assert (stopped / "train/checkpoint-1").is_dir()
    train.make(config.load(stopped), {})
    train.make(config.load(whole), {})
    assert read_weights(stopped) == read_weights(whole)


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_stale(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_run(grpo_run, tmp_path / "run", **FORM, steps=2, eval_images=0)
    train.make(config.load(folder), {})
    begin(folder, make_grpo_sections(**{**FORM, "learning_rate": 2e-2}, steps=2, eval_images=0))
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})
    other = make_grpo_sections(**FORM, steps=2, eval_images=0)
    begin(folder, {**other, "score.form": {"kind": "text", "captions": ["hasty"]}})
    with pytest.raises(RefusedError, match=r"are stale: .*score\.form\.kind: \[tests\.support\.letters\] -> \[text\]"):
        train.make(config.load(folder), {})
    begin(folder, make_grpo_sections(**{**FORM, "learning_rate": 2e-2}, steps=2, eval_images=0))
    before = read_weights(folder)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(train, "save_model", raise_interrupt)  # after the last step, before the model is saved
        train.make(config.load(folder), {}, stale="redo")
    assert read_weights(folder) == before
    train.make(config.load(folder), {})
    assert read_weights(folder) != before


def raise_interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_finished_model_is_not_trained_again(grpo_run: Path, tmp_path: Path) -> None:
    folder = copy_run(grpo_run, tmp_path / "run", **FORM, steps=1, eval_images=0)
    train.make(config.load(folder), {})
    shutil.rmtree(folder / "train")
    before = (folder / "model/model.safetensors").stat().st_mtime_ns
    train.make(config.load(folder), {})
    assert (folder / "model/model.safetensors").stat().st_mtime_ns == before and not (folder / "train").exists()
    (folder / "recipes").mkdir()
    (folder / "recipes/scenes.toml").write_text(
        (ROOT / "stages/recipes/scenes.toml").read_text().replace("the", "this")
    )
    with pytest.raises(RefusedError, match="asks"):
        train.make(config.load(folder), {})


@pytest.mark.slow
def test_a_stale_model_can_be_kept(grpo_run: Path, tmp_path: Path) -> None:
    folder = copy_run(grpo_run, tmp_path / "run", **FORM, steps=1, eval_images=0)
    train.make(config.load(folder), {})
    before = read_weights(folder), (folder / "step/00000.parquet").read_bytes()
    begin(folder, make_grpo_sections(**{**FORM, "learning_rate": 2e-2}, steps=1, eval_images=0))
    shutil.rmtree(folder / "train")
    train.make(config.load(folder), {}, stale="keep")
    assert (read_weights(folder), (folder / "step/00000.parquet").read_bytes()) == before
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})


@pytest.mark.slow
def test_checkpoints_of_unknown_provenance_are_refused(grpo_run: Path, tmp_path: Path) -> None:
    folder = copy_run(grpo_run, tmp_path / "run", **FORM, steps=1, eval_images=0)
    train.make(config.load(folder), {})
    shutil.rmtree(folder / "step")
    with pytest.raises(RefusedError, match=r"are stale: their provenance is unknown: .*step/00000.parquet is missing"):
        train.make(config.load(folder), {})


@pytest.mark.slow
def test_there_is_a_curve_before_the_first_step(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_run(grpo_run, tmp_path / "run", **FORM)
    monkeypatch.setattr(grpo, "make_trainer", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.make(config.load(folder), {})
    assert pq.read_metadata(folder / "step/00000.parquet").num_rows == 0
    begin(folder, make_grpo_sections(**{**FORM, "learning_rate": 2e-2}))
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})
    recap("report", "--run", folder)  # of a training without any step


def read_weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def read_curve(folder: Path, name: str) -> list[float]:
    return [row["value"] for row in pq.read_table(folder / "step/00000.parquet").to_pylist() if row["name"] == name]


def test_the_manifest_of_the_model_is_valid(tmp_path: Path) -> None:
    from pipeline.execution.pass_graph import list_passes

    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    run = config.load(tmp_path)
    assert {p.title for p in list_passes(run)} >= {"rubric:committee", "score:committee:student"}
    assert set(run.sections["train"][""].options.config.rewards) <= set(run.sections["score"])
