"""The promises of GRPO: what cannot be scored moves nothing, rewards are the scorers, and a kill changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.errors import MachineError, RefusedError, StoppedError, UserError
from pipeline.execution.run_state import RunState
from pipeline.records import Caption, Criterion, ImageRubric
from pipeline.storage import tables
from stages import flags, scorers, train
from stages.training.methods.grpo import Reward, breakdown, check_prompt, complete, manners, reader, unexpanded
from tests.support.runs import begin, make, recap

ROOT = Path(__file__).parent.parent.parent
TEACHERS = ("warm", "boxy", "plain", "central")
END = 2  # the token that ends an answer


def sections(**changes: Any) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {
        "source": {"kind": "scenes", "num_images": 16, "seed": 7, "broken_share": 0.0, "duplicate_share": 0.0},
        **{f"engines.{name}": {"kind": "stages.scenes.teachers", "teacher": name} for name in ("hasty", *TEACHERS)},
        **{f"caption.{name}": {"recipe": "scenes", "engine": name} for name in ("hasty", *TEACHERS)},
        "rubric.committee": {"teachers": list(TEACHERS), "student": "hasty"},
        "score.committee": {"kind": "rubric", "rubric": "committee", "captions": ["hasty"]},
        "score.form": {"kind": "tests.support.letters", "captions": ["hasty"]},
        "train": {
            "method": "grpo",
            "model": "scenes-captioner",
            "captions": ["hasty"],
            "rewards": {"committee": 1.0},
            "group_size": 2,
            "batch_size": 4,
            "steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "optimizer": "masters",
            "max_tokens": 64,
            "eval_images": 2,
            "eval_steps": 4,
            "save_steps": 2,
            "log_steps": 1,
        },
    }
    made["train"] |= changes
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = begin(tmp_path_factory.mktemp("reinforced") / "run", sections())
    for what in ("ingest", "caption", "rubric"):
        assert make(folder, what).exit_code == 0
    return folder


def copy(run: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(run, to)
    return begin(to, sections(**changes))


def reward(run: Path, asked: Mapping[str, Any] | None = None) -> tuple[Reward, dict[str, Any]]:
    """The reward of the run, and the columns that TRL hands it with the captions that the student had."""
    loaded = config.load(run)
    scorer = scorers.load_scorer(loaded.sections["score"]["committee"].scorer, run=run, field="score.committee")
    rubrics = {row.key: row.criteria for row in tables.read_rows(run / "rubric/committee/00000.parquet", ImageRubric)}
    captions = list(tables.read_rows(run / "caption/hasty/00000.parquet", Caption))
    columns = {
        "completions": [[{"role": "assistant", "content": row.text}] for row in captions],
        "completion_ids": [[7, END]] * len(captions),
        "key": [row.key for row in captions],
        **{name: [""] * len(captions) for name in ("alt_text", "source_key", "file", "offset", "num_bytes")},
    }
    given = rubrics if asked is None else asked
    read = reader(None, ends={END}, max_tokens=64)
    made = Reward("committee", scorer, engines={}, data=lambda _: b"", asked=given, read=read, max_error_share=0.2)
    return made, columns


def test_a_reward_is_what_the_score_stage_says(run: Path) -> None:
    assert make(run, "score").exit_code == 0
    scored = pq.read_table(run / "score/committee/hasty/00000.parquet")["value"].to_pylist()
    given, columns = reward(run)
    told: dict[str, float] = {}
    assert given(**columns, log_metric=told.__setitem__) == scored
    assert told["unscored/committee"] == 0
    assert {"met/committee/weight_3", "met/committee/weight_2"} <= set(told)


def test_what_cannot_be_scored_gives_no_reward(run: Path) -> None:
    given, columns = reward(run, asked={})
    told: dict[str, float] = {}
    assert given(**columns, log_metric=told.__setitem__) == [None] * len(columns["key"])
    assert told["unscored/committee"] == 1


def test_what_the_caption_stage_refuses_earns_nothing(run: Path) -> None:
    given, columns = reward(run)
    before = given(**columns, log_metric=lambda *_: None)
    loops = "A red ring. " * 40
    columns["completion_ids"] = [[7, 7], *columns["completion_ids"][1:]]  # it was cut
    columns["completions"] = [*columns["completions"][:-1], loops]
    told: dict[str, float] = {}
    after = given(**columns, log_metric=told.__setitem__)
    assert min(value for value in before if value is not None) > 0
    assert after == [0.0, *before[1:-1], 0.0]
    assert told["rate/unusable"] == pytest.approx(2 / len(after))


def test_what_is_met_is_counted_by_weight_and_sort() -> None:
    criteria = [
        Criterion(id="states_object_1", verdict="yes", value=1.0, weight=3.0, reason=None),
        Criterion(id="states_object_2", verdict="no", value=0.0, weight=3.0, reason=None),
        Criterion(id="plain", verdict=None, value=None, weight=1.0, reason=None),
    ]
    assert breakdown(criteria) == {"states_object": [1.0, 0.0], "weight_3": [1.0, 0.0]}


def test_an_answer_that_one_judge_could_not_mark_has_no_sum() -> None:
    import torch

    rewards = torch.tensor([[0.5, 0.6], [0.5, torch.nan]])
    assert torch.isnan(complete(rewards)).tolist() == [[False, False], [True, True]]


def test_manners_are_rates() -> None:
    told = manners(["A red star.", "This caption is accurate and complete."], flags.load("english", run=None))
    assert told["rate/self_praise"] == 0.5
    assert told["words"] == 4.5


def test_a_prompt_with_image_tokens_twice_is_noticed() -> None:
    from PIL import Image

    from stages.scenes import tiny_model

    processor = tiny_model.create_processor()
    picture = Image.new("RGB", (96, 96))
    prompt = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    ids = processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0].tolist()
    check_prompt(ids, prompt, processor)
    doubled = [one for i in ids for one in ([i, i] if i == processor.image_token_id else [i])]
    with pytest.raises(AssertionError, match="6294"):
        check_prompt(doubled, prompt, processor)
    once = unexpanded(ids, processor.image_token_id)
    assert once.count(processor.image_token_id) == 1
    assert [i for i in once if i != processor.image_token_id] == [i for i in ids if i != processor.image_token_id]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "needs rewards"),
        ({"rewards": {"comittee": 1.0}}, "comittee"),
        ({"batch_size": 3}, "group_size"),
        ({"method": "sft"}, 'rewards is a key of method = "grpo", and this is method = "sft"'),
        ({"turns": 2}, 'turns is a key of method = "sft", and this is method = "grpo"'),
        ({"lora": 4}, "lora needs"),
        ({"rewards": {"committee": 0.0}}, "a weight is a number above 0"),
        ({"rewards": {"committee": float("nan")}}, "a weight is a number above 0"),
        ({"captions": ["hasty", "warm"]}, "grpo asks the words of one pass"),
        ({"model": "/nowhere/model"}, "run.toml: train.model: '/nowhere/model' does not load"),
        ({"recipe": "scene"}, "run.toml: train.recipe: 'scene' is none of .*did you mean 'scenes'"),
        ({"captions": ["hastie"]}, "hastie"),
        ({"eval_images": 16}, "eval_images"),
    ],
)
def test_what_is_wrong_in_train_is_said(run: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.make(config.load(copy(run, tmp_path / "run", **changes)), {})


def test_what_is_not_installed_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(UserError, match=r"run.toml: train.rollouts: .*pip install 'recap-pipeline\[vllm\]'"):
        train.make(config.load(copy(run, tmp_path / "run", rollouts="vllm")), {})
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run.toml: train: needs trl: pip install 'recap-pipeline\[train\]'"):
        train.make(config.load(run), {})


@pytest.mark.parametrize(
    ("folder", "message"), [("rubric", "recap run rubric makes them"), ("image", "nothing usable in image")]
)
def test_without_tables_it_is_said_what_makes_them(run: Path, tmp_path: Path, folder: str, message: str) -> None:
    shutil.rmtree(copy(run, tmp_path / "run") / folder)
    with pytest.raises(UserError, match=message):
        train.make(config.load(tmp_path / "run"), {})


def test_tables_that_are_stale_or_not_all_there_are_not_learnt_from(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run")
    made = config.load(folder)
    assert train.reads(made) == ["image", "rubric/committee"]
    RunState(made).check_done(train.reads(made))
    begin(folder, {**sections(), "rubric.committee": {"teachers": list(TEACHERS), "student": "hasty", "agree": 3}})
    done = recap("run", "train", "--run", folder, check=False)
    assert done.returncode == 2 and "rubric:committee: 1 of 1 shards" in done.stderr, done.stderr
    assert "stale: agree: 0 -> 3" in done.stderr and "recap run rubric:committee --stale redo" in done.stderr
    begin(folder, sections())
    (folder / "image/00000.parquet").unlink()
    with pytest.raises(
        RefusedError, match=r"ingest: 1 of 1 shards are not as .* missing; make them by `recap run ingest"
    ):
        RunState(made).check_done(train.reads(made))
    RunState(made, stale="keep").check_done(train.reads(made))


def test_a_reward_that_mostly_fails_ends_the_training(run: Path) -> None:
    given, columns = reward(run, asked={})
    with pytest.raises(MachineError, match=r"score\.committee: 256 of the last 256 answers .*no rubric"):
        for _ in range(256):
            given(**columns, log_metric=lambda *_: None)


# a reward by which answers differ, whatever is claimed
FORM = {"rewards": {"form": 1.0}, "learning_rate": 1e-2}


@pytest.mark.slow
def test_a_group_without_a_reward_moves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = copy(run, tmp_path / "moved", **FORM, steps=2, eval_images=0)
    train.make(config.load(moved), {})
    monkeypatch.setattr(Reward, "__call__", lambda _, *, completions, **__: [None] * len(completions))
    still = copy(run, tmp_path / "still", **FORM, steps=2, eval_images=0)
    train.make(config.load(still), {})
    assert max(curve(moved, "grad_norm")) > 0
    assert set(curve(still, "grad_norm")) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "lora": 4}])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """It is stopped after the evaluation at step 2; order, draws, optimizer and curve go on from there."""
    start, whole, killed = (
        copy(run, tmp_path / name, **FORM, eval_steps=2, **settings) for name in ("start", "whole", "killed")
    )
    begin(start, sections(**{**FORM, **settings, "learning_rate": 0.0}, steps=1))
    for folder in (start, whole, killed):
        train.make(config.load(folder), {})
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "train" / "checkpoint-4")
    train.make(config.load(killed), {})
    assert weights(start) != weights(whole) == weights(killed)
    assert curve(whole, "reward") == curve(killed, "reward")
    assert curve(whole, "eval_reward") == curve(killed, "eval_reward")


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint(run: Path, tmp_path: Path) -> None:
    stopped, whole = (copy(run, tmp_path / name, **FORM) for name in ("stopped", "whole"))
    stop = Event()
    stop.set()
    with pytest.raises(StoppedError):
        train.make(config.load(stopped), {}, stop=stop)
    assert (stopped / "train/checkpoint-1").is_dir()
    train.make(config.load(stopped), {})
    train.make(config.load(whole), {})
    assert weights(stopped) == weights(whole)


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_not_gone_on_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(run, tmp_path / "run", **FORM, steps=2, eval_images=0)
    train.make(config.load(folder), {})
    begin(folder, sections(**{**FORM, "learning_rate": 2e-2}, steps=2, eval_images=0))
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})
    other = sections(**FORM, steps=2, eval_images=0)
    begin(folder, {**other, "score.form": {"kind": "text", "captions": ["hasty"]}})
    with pytest.raises(RefusedError, match=r"otherwise: .*score\.form\.kind: \[tests\.letters\] -> \[text\]"):
        train.make(config.load(folder), {})
    begin(folder, sections(**{**FORM, "learning_rate": 2e-2}, steps=2, eval_images=0))
    before = weights(folder)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(train, "_finished", raise_interrupt)  # after its last step, before the model is in place
        train.make(config.load(folder), {}, stale="redo")
    assert weights(folder) == before
    train.make(config.load(folder), {})
    assert weights(folder) != before


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_what_is_done_is_not_trained_again(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run", **FORM, steps=1, eval_images=0)
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
def test_what_is_kept_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run", **FORM, steps=1, eval_images=0)
    train.make(config.load(folder), {})
    before = weights(folder), (folder / "step/00000.parquet").read_bytes()
    begin(folder, sections(**{**FORM, "learning_rate": 2e-2}, steps=1, eval_images=0))
    shutil.rmtree(folder / "train")
    train.make(config.load(folder), {}, stale="keep")
    assert (weights(folder), (folder / "step/00000.parquet").read_bytes()) == before
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})


@pytest.mark.slow
def test_checkpoints_of_unknown_origin_are_not_gone_on_from(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run", **FORM, steps=1, eval_images=0)
    train.make(config.load(folder), {})
    shutil.rmtree(folder / "step")
    with pytest.raises(RefusedError, match=r"otherwise: nobody knows how, for .*step/00000.parquet has gone"):
        train.make(config.load(folder), {})


def test_a_curve_is_there_before_the_first_step(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(run, tmp_path / "run", **FORM)
    monkeypatch.setattr("stages.training.methods.grpo.trainer", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.make(config.load(folder), {})
    assert pq.read_metadata(folder / "step/00000.parquet").num_rows == 0
    begin(folder, sections(**{**FORM, "learning_rate": 2e-2}))
    with pytest.raises(RefusedError, match="learning_rate"):
        train.make(config.load(folder), {})
    recap("report", "--run", folder)  # of a training without a step yet


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def curve(folder: Path, name: str) -> list[float]:
    return [row["value"] for row in pq.read_table(folder / "step/00000.parquet").to_pylist() if row["name"] == name]


def test_the_manifest_of_the_model_is_valid(tmp_path: Path) -> None:
    from pipeline.execution.pass_graph import list_passes

    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    run = config.load(tmp_path)
    assert {p.title for p in list_passes(run)} >= {"rubric:committee", "score:committee:student"}
    assert set(run.sections["train"][""].rewards) <= set(run.sections["score"])


def test_every_arm_of_the_miniature_is_a_valid_training(tmp_path: Path) -> None:
    from benchmarks import miniature

    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    made = miniature.arms(config.load(tmp_path).sections["train"][""])
    drawn = {arm: one.steps * one.batch_size for arm, one in made.items() if one is not None}
    assert drawn.pop("one mark") * 4 == drawn["rubrics"]
    assert set(drawn.values()) == {51200}
