"""An interrupted training resumes with the same result, and the trained model is an engine's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config
from pipeline.engines import Request, Sampling
from pipeline.engines import transformers as engines
from stages import train
from stages.training.dataset import read_image_file
from tests.support.runs import ROOT, begin, make
from tests.support.training_runs import make_sft_sections, read_sft_examples


@pytest.mark.slow
def test_a_killed_training_resumes_with_the_same_result(sft_run: Path, tmp_path: Path) -> None:
    """Only its checkpoint after step 4 is left; the model and the curve come out the same."""
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        shutil.copytree(sft_run, folder)
        folders.append(folder)
        train.make(config.load(folder), {})
    whole, killed = folders
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "train" / "checkpoint-6")
    (killed / "train" / "checkpoint-9").mkdir()  # incomplete
    (killed / "train" / ".examples.arrow.0.tmp").touch()  # incomplete too
    train.make(config.load(killed), {})
    assert (whole / "model/model.safetensors").read_bytes() == (killed / "model/model.safetensors").read_bytes()
    assert "held-out" in (killed / "model/README.md").read_text()
    assert not [file for folder in folders for file in (folder / "train").glob("*.arrow*")]


@pytest.mark.slow
def test_one_training_learns_with_and_without_the_image(sft_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "merge.toml").write_text('image = false\nprompt = "Merge: {drafts}"\n')
    parts = make_sft_sections(train={"captions": ["main", "merged"], "steps": 3, "batch_size": 2})
    given = {"drafts": "SELECT key, text FROM statements"}
    parts["caption.merged"] = {"recipe": "merge", "engine": "hasty", "given": given}
    begin(folder, parts)
    assert make(folder, "caption").exit_code == 0
    run = config.load(folder)
    settings = run.sections["train"][""]
    examples = [*settings.options.module.open(run, settings).read_examples()]
    assert {(one.shows_image, one.questions[0].startswith("Merge: 1.\n```\n")) for one in examples} == {
        (True, False),
        (False, True),
    }
    assert (train.make(run, {}) / "model.safetensors").exists()


@pytest.mark.slow
def test_the_trained_model_answers_through_an_engine(sft_run: Path, tmp_path: Path) -> None:
    """Also after it has learnt regions, whose head is not saved."""
    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    begin(folder, make_sft_sections(train={"regions": 1.0, "steps": 3}))
    output = train.make(config.load(folder), {})
    engine = engines.open(engines.Config(model=str(output)))
    example, *_ = read_sft_examples(folder)
    request = Request(
        id="x",
        prompt=example.questions[0],
        images=(read_image_file(vars(example)),),
        ladder=(Sampling(max_tokens=5),),
    )
    (reply,) = engine.generate([request])
    engine.close()
    assert (reply.error, reply.num_output_tokens) == (None, 5)
    assert not any("region" in name for name in list_weights(output))
    assert json.loads((output / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1, "others can read one file and not another"


def list_weights(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    "name",
    [
        "scenes-base",
        "scenes-captioner-placing",
        "scenes-captioner-sft",
        "scenes-judge",
        "scenes-judge-base",
        "scenes-judge-open",
        "scenes-reader",
    ],
)
def test_the_manifests_of_the_models_are_valid(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "manifests" / name, tmp_path, dirs_exist_ok=True)
    run = config.load(tmp_path)
    settings = run.sections["train"][""]
    assert set(settings.captions) <= {*run.sections["caption"], "main"}
    assert getattr(settings.options.config, "scores", "") in {"", *run.sections["score"]}


def list_descendants(parent: int) -> list[int]:
    """A process and all that it started, the last first."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [*(pid for child in children for pid in list_descendants(int(child))), parent]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the group", "each process"])
def test_a_signal_to_all_processes_of_a_training_ends_it_with_a_checkpoint(
    sft_run: Path, tmp_path: Path, to: str
) -> None:
    shutil.copytree(sft_run, tmp_path / "run")
    run = begin(tmp_path / "run", make_sft_sections(train={"steps": 10_000, "save_steps": 10_000, "num_workers": 1}))
    command = [sys.executable, "-m", "pipeline", "run", "train", "--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = []
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "train: step 2/" in line:
                pids = list_descendants(process.pid)
                assert len(pids) > 1
                for pid in pids if to == "each process" else [-process.pid]:
                    os.kill(pid, signal.SIGTERM)
    text = "".join(lines)
    assert process.returncode == 75, text
    assert "Traceback" not in text
    assert "SIGTERM: finishing what is in flight" in text
    assert list((run / "train").glob("checkpoint-*"))
