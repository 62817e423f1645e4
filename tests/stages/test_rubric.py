"""The rubric stage: one rubric for each image with a usable caption of the student."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, plugins
from pipeline.errors import ConfigError
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.pass_graph import list_passes, select_passes
from pipeline.execution.passes import Shard
from pipeline.records import Caption, Image, ImageRubric, Piece, Score, Step
from pipeline.storage import plan, tables
from pipeline.storage.layout import table_path
from stages import rubric, train
from stages.scenes.teachers import TEACHERS
from tests.support import tiny
from tests.support.runs import ROOT, begin, make
from tests.support.scoring import (
    PROVENANCE,
    caption_row,
    image_row,
    list_rubric_passes,
    parse_rubric_run,
)
from tests.support.served import ModelServer, serve_model

WRITERS = ", ".join(plugins.list_names("stages.rubric_writers"))

image_statuses = st.lists(
    st.tuples(*[st.lists(st.sampled_from(["ok", "ok", "error"]), min_size=1, max_size=2)] * 4), max_size=6
)


@pytest.mark.slow
@settings(max_examples=20)
@given(image_statuses)
def test_every_image_with_a_usable_caption_has_one_rubric(
    tmp_path_factory: pytest.TempPathFactory, images: list[tuple[list[str], ...]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    plan.write_plan(folder / "plan.parquet", [Piece(file="f", start=0, stop=max(1, len(images)))], shard_size=100)
    tables.write_rows(
        table_path(folder, "image", 0), Image, [image_row(i, "ok") for i in range(len(images))], PROVENANCE
    )
    for number, name in enumerate(("a", "b", "c", "student")):
        rows = [
            replace(caption_row(i, n, status), name=name, text="A red ring." if number < 3 else "A blue star.")
            for i, statuses in enumerate(images)
            for n, status in enumerate(statuses[number])
        ]
        tables.write_rows(table_path(folder, f"caption/{name}", 0), Caption, rows, PROVENANCE)
    run = parse_rubric_run(folder, agree=2)
    (p,) = rubric.passes(run)
    shard = Shard(run=run, number=0, pieces=plan.Plan.load(folder / "plan.parquet")[0].pieces(0))
    rows = list(p.work(p.inputs(shard), {}))
    usable = [
        (i, sum("ok" in teacher for teacher in passes[:3])) for i, passes in enumerate(images) if "ok" in passes[3]
    ]
    assert [(row.key, row.num_teachers) for row in rows] == [(image_row(i, "ok").key, num) for i, num in usable]
    for row in rows:
        assert row.status == ("ok" if row.num_teachers >= 2 else "empty")
        assert bool(row.criteria) == (row.error is None)


@pytest.mark.slow
def test_a_run_writes_rubrics_and_scores_by_them(tmp_path: Path) -> None:
    engines = {f"engines.{name}": {"kind": "stages.scenes.teachers", "teacher": name} for name in TEACHERS}
    captions = {f"caption.{name}": {"recipe": "scenes", "engine": name} for name in TEACHERS}
    student = {"recipe": "scenes", "engine": "hasty", "num_candidates": 4, "temperature": 1.0}
    run = begin(
        tmp_path / "run",
        {
            "source": {"kind": "scenes", "num_images": 30, "seed": 8, "shard_size": 15},
            **engines,
            **captions,
            "caption.student": student,
            "rubric.committee": {"teachers": list(TEACHERS), "student": "student"},
            "score.rubric": {"kind": "rubric", "rubric": "committee", "captions": ["student", "plain"]},
        },
    )
    assert make(run).exit_code == 0  # `all` makes what it reads
    files = sorted((run / "rubric/committee").glob("*.parquet"))
    rows = [row for file in files for row in tables.read_rows(file, ImageRubric)]
    images = [row for file in sorted((run / "image").glob("*.parquet")) for row in tables.read_rows(file, Image)]
    assert [row.key for row in rows] == [image.key for image in images if image.status == "ok"]
    assert {(row.name, row.writer, row.num_teachers, row.status) for row in rows} == {("committee", "claims", 5, "ok")}
    scores = [
        row
        for name in ("student", "plain")
        for row in tables.read_rows(run / f"score/rubric/{name}/00000.parquet", Score)
    ]
    assert scores and all(row.status == "ok" for row in scores)
    first = next(row for row in rows if row.key == scores[0].key)
    assert [(c.id, c.weight) for c in scores[0].criteria] == [(d.id, d.weight) for d in first.criteria]
    assert make(run).done == 0


def begin_run_with_models(folder: Path, **engine: Any) -> Path:
    """A run of a few pictures with a committee of three, a writer and a judge."""
    names = ("a", "b", "c")
    return begin(
        folder,
        {
            "source": {"kind": "scenes", "num_images": 16, "seed": 8, "broken_share": 0.0, "duplicate_share": 0.0},
            "engines.teacher": {"kind": "echo"},
            "engines.model": {"kind": "echo", **engine},
            **{f"caption.{name}": {"engine": "teacher", "temperature": 0.5} for name in names},
            "caption.student": {"engine": "teacher", "num_candidates": 2, "temperature": 1.0},
            "rubric.mine": {"teachers": list(names), "student": "student", "writer": "llm", "engine": "model"},
            "score.mine": {"kind": "rubric", "rubric": "mine", "judge": "model", "captions": ["student"]},
        },
        max_error_share=1.0,
    )


def override_toml(shipped: str, own: Path, changes: dict[str, str]) -> None:
    """Copies a TOML of stages/ to where a run overrides it, with some of its text replaced."""
    text = (ROOT / "stages" / shipped).read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    own.parent.mkdir()
    own.write_text(text)


def read_rubrics(run: Path) -> list[ImageRubric]:
    return list(tables.read_rows(run / "rubric/mine/00000.parquet", ImageRubric))


@pytest.mark.slow
def test_retry_writes_only_failed_rubrics(tmp_path: Path) -> None:
    run = begin_run_with_models(tmp_path / "run", error_share=0.3)
    for stage in ("ingest", "caption", "rubric", "score"):
        assert make(run, stage).exit_code == 0
    before = read_rubrics(run)
    assert len(before) == 16 and {row.status for row in before} >= {"ok", "error"}
    scores = list(tables.read_rows(run / "score/mine/student/00000.parquet", Score))
    assert len(scores) == 32
    bad = {row.key for row in before if row.status == "error"}
    assert all(score.value is None and "no rubric" in (score.error or "") for score in scores if score.key in bad)
    assert make(run, "rubric", retry=frozenset({"error"})).exit_code == 0
    after = read_rubrics(run)
    assert [row.key for row in after] == [row.key for row in before]
    assert [row for row in after if row.key not in bad] == [row for row in before if row.key not in bad]
    assert sum(row.status == "error" for row in after) < len(bad)


TRAIN_SECTION = """
[train]
method = "grpo"
model = "scenes-captioner"
recipe = "scenes"
captions = ["student"]
rewards = { mine = 1.0 }
group_size = 2
batch_size = 4
steps = 2
max_tokens = 64
eval_images = 0
log_steps = 1
"""


@pytest.mark.vllm
def test_served_models_write_and_judge(tiny_server: ModelServer, served_flags: dict[str, Any], tmp_path: Path) -> None:
    """As in manifests/rubicap-qwen2.5-vl-3b: a served model writes, and another, which sees text only, judges."""
    served = {"kind": "openai", "model": "tiny", "max_pixels": tiny.PIXELS**2}
    run = begin_run_with_models(tmp_path / "run", **served, base_url="http://127.0.0.1:1/v1")
    # An untrained model prefers empty lists, and generates long strings and white space.
    hot = {"temperature = 0.0": "temperature = 1.0", "ladder = [0.3, 0.6, 0.9]": f"ladder = {[1.0] * 7}"}
    brief = {"max_criteria = 12": "min_criteria = 1\nmax_criteria = 2", "= 240": "= 16"}
    override_toml("rubric_writers/committee.toml", run / "writers/committee.toml", {**hot, **brief})
    short = {"max_tokens = 2048": "max_tokens = 128"}
    override_toml("rubrics/text_only.toml", run / "rubrics/text_only.toml", {**hot, **short})
    toml = (run / "run.toml").read_text() + TRAIN_SECTION

    def at(server: ModelServer) -> config.Run:
        (run / "run.toml").write_text(toml.replace("http://127.0.0.1:1/v1", f"{server.address}/v1"))
        return config.load(run)

    at(tiny_server)
    for stage in ("ingest", "caption", "rubric"):
        assert make(run, stage).exit_code == 0
    rows = read_rubrics(run)
    assert len(rows) == 16 and sum(row.status == "ok" for row in rows) >= 8, [row.error for row in rows]
    assert all(row.model == "tiny" and row.engine == "model" for row in rows)
    assert all(d.agreed >= 2 and 0 < d.missed <= 1 for row in rows for d in row.criteria)
    with serve_model(tiny.save_text_model(tmp_path / "text"), **served_flags) as judge:
        loaded = at(judge)
        assert make(run, "score").exit_code == 0
        scores = list(tables.read_rows(run / "score/mine/student/00000.parquet", Score))
        num_answered = judge.num_answered()
        model = train.make(loaded, EnginePool(loaded.engines, stop=threading.Event()))
        assert judge.num_answered() >= num_answered + 8
    assert len(scores) == 32 and any(score.status == "ok" for score in scores)
    assert all((score.value is None) == (score.status != "ok") for score in scores)
    unscored = [
        step.value for step in tables.read_rows(run / "step/00000.parquet", Step) if step.name == "unscored/mine"
    ]
    assert len(unscored) == 2 and min(unscored) < 1, unscored
    assert (model / "model.safetensors").exists()


def test_rubicap_manifest_is_valid(tmp_path: Path) -> None:
    shutil.copy(ROOT / "manifests/rubicap-qwen2.5-vl-3b/run.toml", tmp_path / "run.toml")
    run = config.load(tmp_path)
    passes = {p.title: p for p in list_passes(run)}
    rubric_pass, score_pass = passes["rubric:committee"], passes["score:committee:student"]
    assert len(run.sections["rubric"]["committee"].teachers) == 5
    assert rubric_pass.engines and score_pass.engines and "rubric/committee" in score_pass.reads
    settings = run.sections["train"][""]
    assert settings.method == "grpo" and set(settings.options.config.rewards) == {"committee"}
    assert set(settings.captions) <= set(run.sections["caption"])


def test_run_all_skips_rubrics_that_nothing_reads(tmp_path: Path) -> None:
    passes = list_passes(parse_rubric_run(tmp_path))
    assert "rubric:mine" not in {p.title for p in select_passes(passes, "all")}
    (p,) = select_passes(passes, "rubric")
    assert p.reads == ("caption/student", "caption/a", "caption/b", "caption/c", "image")
    assert json.loads(json.dumps(p.slice)) == p.slice


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teachers": ["a", "d"]}, "rubric.mine.teachers: 'd' is none of a, b, c, student"),
        ({"student": "pupil"}, "rubric.mine.student: 'pupil' is none of a, b, c, student"),
        ({"teachers": []}, "rubric.mine: teachers is \\[\\]; it must name at least one"),
        ({"teachers": ["a", "a"]}, "each once"),
        ({"teachers": ["a", "student"]}, "student is 'student', which is one of the teachers too"),
        ({"agree": 4}, "agree = 4 is more than the 3 teachers"),
        ({"writer": "claim"}, f"rubric.mine.writer: 'claim' is none of {WRITERS}; did you mean 'claims'"),
        ({"engine": "model"}, "rubric.mine.engine: is not for the writer claims"),
        ({"writer": "llm"}, "rubric.mine.engine: is missing"),
        ({"writer": "llm", "engine": "modle"}, "rubric.mine.engine: 'modle' is none of model"),
    ],
)
def test_errors_name_the_section_and_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_rubric_passes(tmp_path, **section)
