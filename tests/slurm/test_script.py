"""Slurm without a Slurm: the scripts as text, what waits for what, and `[slurm]` read strictly."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import ConfigError, RefusedError
from pipeline.execution.passes import all_passes
from pipeline.slurm import scheduler
from pipeline.slurm.jobs import JobMonitor
from pipeline.slurm.options import seconds
from pipeline.slurm.script import JobArray, SlurmRun
from pipeline.slurm.submit import Job, Submission, find_block, find_queued_blocks, plan_jobs
from pipeline.storage.plan import parse_spec
from tests.support.runs import ROOT, begin, corpus, make, recap, sections, write

EXAMPLE = {
    "partition": "gpu",
    "account": "vision",
    "cpus": 8,
    "memory": "64G",
    "time": "04:00:00",
    "max_running": 64,
    "setup": ["module load cuda/12.4"],
    "command": "/data/venv/bin/recap",
}


def cluster(folder: Path, num_shards: int, slurm: dict[str, Any], **changes: Any) -> SlurmRun:
    run = write(folder / "run", sections(folder, **changes) | {"slurm": slurm})
    return SlurmRun(run=config.load(run), num_shards=num_shards)


@given(num_shards=st.integers(1, 300), data=st.data())
def test_every_shard_is_in_the_block_that_names_it(num_shards: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, num_shards))
    for block in range(num):
        assert {find_block(shard, num, num_shards) for shard in parse_spec(f"{block}/{num}", num_shards)} == {block}


def test_the_script_in_the_documentation_is_the_one_that_is_printed(tmp_path: Path) -> None:
    model = {"kind": "vllm", "model": "internlm/CapRL-3B"}
    found = cluster(tmp_path, 100_000, EXAMPLE, engines__captioner=model)
    (job,) = [job for job in plan_jobs(all_passes(found.run)) if job.title == "caption"]
    text = found.array(JobArray(job=job, offset=0, blocks=tuple(range(1000))))
    text = text.replace(str(tmp_path / "run"), "/data/runs/photos").replace(found.prefix, "recap-1a2b3c4d-")
    assert text in (ROOT / "docs" / "clusters.md").read_text(), text


def test_every_key_stands_in_the_documentation() -> None:
    from dataclasses import fields

    from pipeline.sections import Resources, SlurmSettings

    page = (ROOT / "docs" / "clusters.md").read_text()
    for field in (*fields(SlurmSettings), *fields(Resources)):
        assert f"| `{field.name}` | {field.metadata['help'].replace('|', '')} |" in page


def laid(found: SlurmRun, **chain: Any) -> tuple[int, list[tuple[str, str]]]:
    """What is put into an empty queue, or one that has the blocks in `busy`: titles and dependencies."""
    put: list[tuple[str, str]] = []

    def place(title: str, _: str, dependency: str) -> str:
        put.append((title, dependency))
        return str(100 + len(put))

    every = plan_jobs(all_passes(found.run))
    due: dict[str, Any] = {job.title: range(found.num_blocks) for job in every} | chain.pop("due", {})
    settings: dict[str, Any] = {"window": 1000, "busy": {}, "servers": {}} | chain
    return Submission(cluster=found, jobs=every, due=due, put=place, **settings).lay(every), put


def test_stages_wait_for_the_same_block_and_the_card_for_all(tmp_path: Path) -> None:
    num, put = laid(cluster(tmp_path, 12, {"gpus": 0}))
    assert num == 60
    assert put == [
        ("ingest", ""),
        ("caption", "aftercorr:101"),
        ("score", "aftercorr:101:102"),
        ("filter", "aftercorr:101:102:103"),
        ("export", "aftercorr:101:102:103:104"),
        ("export-whole", "afterok:105"),
    ]


def test_windows_of_a_throttled_stage_follow_each_other(tmp_path: Path) -> None:
    _, put = laid(cluster(tmp_path, 12, {"max_running": 3}), window=5, due={"caption": ()})
    assert put[:4] == [
        ("ingest", ""),
        ("ingest.1", "afterany:101"),
        ("ingest.2", "afterany:102"),
        ("score", "aftercorr:101"),
    ]


def test_what_is_on_its_way_is_waited_for_and_not_submitted(tmp_path: Path) -> None:
    found = cluster(tmp_path, 4, {})
    busy = {("caption", block): "7" for block in (0, 1)}
    _, put = laid(found, busy=busy, due={"ingest": (), "caption": (0, 1, 2)})
    assert put[:4] == [("caption", ""), ("score", "aftercorr:103"), ("score", "aftercorr:7"), ("score", "")] or put[
        :4
    ] == [("caption", ""), ("score", ""), ("score", "aftercorr:101"), ("score", "aftercorr:7")]


def test_a_served_engine_has_a_job_that_ends_with_its_last_user(tmp_path: Path) -> None:
    judge = {"kind": "openai", "model": "judge", "base_url": "endpoint"}
    found = cluster(tmp_path, 2, {"serve": ["judge"]}, engines__judge=judge)
    _, put = laid(found)
    assert ("serve-judge", "") in put
    assert ("score", "aftercorr:101:102,after:103") in put
    assert put[-1] == ("release-judge", "afterany:104")
    assert "scancel 103" in found.release("judge", "103")
    assert "--gres" in found.server("judge")
    score = next(job for job in plan_jobs(all_passes(found.run)) if job.title == "score")
    text = found.array(JobArray(job=score, offset=0, blocks=(0, 1)))
    assert "--gres" not in text
    assert f"[ -e {found.endpoint('judge')} ] && break" in text
    assert f"squeue --noheader --name={found.prefix}serve-judge" in text


OPENAI = {"kind": "openai", "model": "judge", "base_url": "endpoint"}


@pytest.mark.parametrize(
    ("engine", "slurm", "says"),
    [
        (OPENAI, {"serve": ["jugde"]}, ["slurm.serve", "did you mean 'judge'"]),
        (OPENAI, {"serve": ["judge"]}, ["engines.judge", "on 0.0.0.0 everyone could ask it", "api_key_env"]),
        ({**OPENAI, "base_url": "http://a/v1"}, {"serve": ["judge"]}, ["engines.judge", 'base_url = "endpoint"']),
        ({"kind": "vllm", "model": "judge"}, {"serve": ["judge"]}, ["engines.judge", 'kind = "openai"']),
        (OPENAI, {"serve": ["judge"], "serve_host": "127.0.0.1"}, []),
        ({**OPENAI, "api_key_env": "JUDGE_KEY"}, {"serve": ["judge"]}, []),
    ],
)
def test_an_engine_that_could_not_be_served_or_asked_is_named(
    tmp_path: Path, engine: dict[str, Any], slurm: dict[str, Any], says: list[str]
) -> None:
    parts = {**sections(corpus(tmp_path / "photos", ["jpg"])), "engines.judge": engine, "slurm": slurm}
    run = begin(tmp_path / "run", parts)
    done = recap("slurm", "script", "score", "--run", run, check=False)
    assert done.returncode == (2 if says else 0)
    assert all(word in done.stderr for word in says), done.stderr


def fake_slurm(folder: Path, queued: str) -> dict[str, str]:
    """Commands of a Slurm in whose queue `queued` is, a line for each task; it takes every job."""
    says = {"squeue": f"printf %s '{queued}'", "sbatch": "cat > /dev/null; echo 100", "scontrol": "true"}
    folder.mkdir()
    for name, does in says.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_file_of_a_server_that_runs_stays_where_an_engine_is_called_like_a_stage(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"]), caption__dense={"engine": "caption"})
    parts |= {"engines.caption": {**OPENAI, "api_key_env": "KEY"}, "slurm": {"serve": ["caption"]}}
    run = begin(tmp_path / "run", parts)
    found = SlurmRun(run=config.load(run), num_shards=1)
    endpoint = found.endpoint("caption")
    endpoint.parent.mkdir()
    endpoint.write_text("{}")
    env = fake_slurm(tmp_path / "bin", f"77|N/A|RUNNING|node|{found.prefix}serve-caption|None|(null)")
    said = recap("slurm", "submit", "caption", "ingest", "--run", run, **env).stderr
    assert "100: caption, after" in said and "serve-caption" not in said
    assert endpoint.exists()


def test_what_runs_and_what_ended_without_a_word_is_told_by_the_comment(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 4), source={"shard_size": 1}, slurm={"num_tasks": 2})
    run = begin(tmp_path / "run", parts)
    prefix = SlurmRun(run=config.load(run), num_shards=4).prefix
    recap("slurm", "submit", "ingest", "--run", run, **fake_slurm(tmp_path / "submitted", ""))
    (run / "slurm" / "logs" / "ingest-100_0.log").write_text("Killed\n")
    task = f"100|1|RUNNING|gpu07|{prefix}ingest|None|blocks=2,offset=0,shards=4"
    shown = recap("status", "--run", run, **fake_slurm(tmp_path / "running", task)).stdout
    assert "running ingest: 2-3 on gpu07 (100_1)" in shown
    assert "failed ingest 00000: its task ended early (Killed)" in shown


@pytest.mark.parametrize(
    ("comment", "says"),
    [
        ("blocks=4,offset=2,shards=12", []),
        ("blocks=3,offset=2,shards=12", ["3 blocks of 12 shards", "4 of 12", "slurm.num_tasks = 3"]),
        ("blocks=4,offset=2,shards=11", ["4 blocks of 11 shards", "4 of 12: wait for it, or `scancel` it"]),
    ],
)
def test_a_task_whose_block_has_other_shards_now_is_named(tmp_path: Path, comment: str, says: list[str]) -> None:
    found = cluster(tmp_path, 12, {"num_tasks": 4})
    name, told = f"{found.prefix}caption", {"state": "PENDING", "node": "", "reason": "Priority"}
    task = scheduler.QueuedTask(array="7", index=1, name=name, comment=comment, **told)
    if not says:
        assert find_queued_blocks(found, [task]) == {("caption", 3): "7"}
        return
    with pytest.raises(RefusedError) as error:
        find_queued_blocks(found, [task])
    assert all(word in str(error.value) for word in says), error.value


@pytest.mark.parametrize(
    ("engine", "slurm", "says"),
    [
        ({}, {"gpus": 8}, ["slurm.caption.gpus", "of 8 no more than 1", "set gpus = 1, or workers = 8"]),
        ({}, {"gpus": 8, "workers": 8}, []),
        ({"tensor_parallel_size": 4}, {"gpus": 8}, ["no more than 4", "set gpus = 4, or workers = 2"]),
        ({"tensor_parallel_size": 4}, {"gpus": 8, "workers": 2}, []),
        ({"tensor_parallel_size": 2, "extra": {"pipeline_parallel_size": 4}}, {"gpus": 8}, []),
        ({"kind": "transformers"}, {"gpus": 2}, ["no more than 1"]),
        ({}, {"workers": 8}, ["1 are too few", "each needs 1 for engines.captioner", "set gpus = 8, or workers = 1"]),
        ({"tensor_parallel_size": 4}, {"gpus": 4, "workers": 2}, ["4 are too few", "set gpus = 8, or workers = 1"]),
        ({}, {"gpus": 0, "workers": 2}, []),
        ({"kind": "stages.scenes.teachers", "model": None, "teacher": "hasty"}, {"workers": 4}, []),
        ({"kind": "echo", "model": None}, {"gpus": 8}, []),
    ],
)
def test_gpus_are_as_many_as_the_processes_use(
    tmp_path: Path, engine: dict[str, Any], slurm: dict[str, Any], says: list[str]
) -> None:
    captioner = {name: value for name, value in ({"kind": "vllm", "model": "m"} | engine).items() if value}
    parts = {**sections(corpus(tmp_path / "photos", ["jpg"] * 8), source={"shard_size": 1}), "slurm.caption": slurm}
    run = begin(tmp_path / "run", parts | {"engines.captioner": captioner, "slurm": {"num_tasks": 1}})
    done = recap("slurm", "script", "caption", "--run", run, check=False)
    assert done.returncode == (2 if says else 0), done.stderr
    assert all(word in done.stderr for word in says), done.stderr
    if not says:
        workers = f" --workers {slurm['workers']}" if "workers" in slurm else ""
        assert f'run caption --shard "$block/1"{workers} --run' in done.stdout


def test_the_processes_at_work_are_the_workers_of_all_tasks(tmp_path: Path) -> None:
    found = cluster(tmp_path, 8, {"num_tasks": 2}, slurm__ingest={"workers": 3})
    passes = all_passes(found.run)
    told = {"name": f"{found.prefix}ingest", "comment": "blocks=2,offset=0,shards=8", "node": "n", "reason": ""}
    tasks = tuple(scheduler.QueuedTask(array="7", index=index, state="RUNNING", **told) for index in (0, 1))
    watch = JobMonitor(cluster=found, jobs=tuple(plan_jobs(passes)), tasks=tasks, problem="")
    at_work = {p.title: watch.num_workers(p) for p in passes}
    assert (at_work["ingest"], at_work["filter"]) == (6, 0)


def test_workers_without_shards_of_their_own_are_named(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 8), source={"shard_size": 1})
    slurm = {"slurm.caption": {"gpus": 2, "workers": 2}}
    run = begin(tmp_path / "run", parts | slurm | {"engines.captioner": {"kind": "vllm", "model": "m"}})
    said = recap("slurm", "script", "caption", "--run", run).stderr
    assert "a task has 1 shards for 2 workers; with slurm.num_tasks = 4" in said


def test_several_scripts_are_none_to_sbatch(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"])))
    text = recap("slurm", "script", "ingest", "caption", "--run", run).stdout
    assert text.startswith("# ingest: script 1 of 2")
    assert "\n# caption: script 2 of 2, a file of its own\n#!/bin/bash\n" in text


def test_a_job_is_not_misled_by_the_folder_that_it_starts_in(tmp_path: Path) -> None:
    found = cluster(tmp_path, 1, {})
    text = found.array(JobArray(job=plan_jobs(all_passes(found.run))[0], offset=0, blocks=(0,)))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit(3)")
    (command,) = (line.partition(" run ingest")[0] for line in text.splitlines() if " run ingest" in line)
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([*command.split(), "--help"], cwd=tmp_path, env=env, capture_output=True).returncode == 0


def test_a_window_adds_its_offset(tmp_path: Path) -> None:
    found = cluster(tmp_path, 12, {})
    job = plan_jobs(all_passes(found.run))[0]
    text = found.array(JobArray(job=job, offset=5, blocks=(5, 6, 9)))
    assert "#SBATCH --array=0-1,4\n" in text
    assert "block=$((SLURM_ARRAY_TASK_ID + 5))" in text


def test_a_stage_that_waits_between_its_passes_is_one_job_a_pass(tmp_path: Path) -> None:
    second = {"recipe": "short", "engine": "captioner", "of": "dense", "where": "judge < 0.5"}
    found = cluster(tmp_path, 3, {}, caption__again=second, score__judge={"captions": ["dense"]})
    titles = [job.title for job in plan_jobs(all_passes(found.run))]
    assert titles.index("caption:dense") < titles.index("caption:again")
    assert not {"caption", "score"} & {job.title for job in plan_jobs(all_passes(found.run)) if "again" in job.title}


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({"partion": "gpu"}, ["slurm.partion", "unknown key", "did you mean 'partition'"]),
        ({"captoin": {"gpus": 2}}, ["slurm.captoin", "unknown key", "did you mean 'caption'"]),
        ({"caption": {"gpu": 2}}, ["slurm.caption.gpu", "unknown key"]),
        ({"time": "four hours"}, ["slurm.ingest.time", "'four hours'", "04:00:00"]),
        ({"time": "00:04:00"}, ["time", "over before the notice of 300 s"]),
        ({"gpus": -1}, ["gpus", "-1", "the least is 0"]),
        ({"server": {"workers": 2}}, ["slurm.server.workers", "replicas"]),
    ],
)
def test_what_is_wrong_in_the_section_is_named(tmp_path: Path, slurm: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        cluster(tmp_path, 1, slurm)
    assert all(word in str(error.value) for word in says), error.value


@pytest.mark.parametrize(
    ("limit", "is_seconds"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("1-12", 129600), ("1-12:30:00", 131400), ("soon", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, is_seconds: int | None) -> None:
    assert seconds(limit) == is_seconds


def test_a_finished_run_needs_no_jobs_and_a_stage_alone_can_be_printed(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4)))
    assert recap("slurm", "script", "caption", "--run", run).stdout.startswith("#!/bin/bash\n#SBATCH --job-name=recap-")
    recap("run", "all", "--run", run)
    assert recap("slurm", "script", "--run", run).stdout == ""


def test_what_is_stale_is_not_submitted_unasked(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 4))
    run = begin(tmp_path / "run", parts)
    make(run)
    write(run, parts | {"caption.dense": {"recipe": "short", "engine": "captioner"}})
    done = recap("slurm", "script", "--run", run, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stale: caption:dense (1 shards)" in done.stderr
    redone = recap("slurm", "script", "caption", "--stale", "redo", "--run", run).stdout
    assert "--stale redo" in redone


def test_titles_of_jobs_are_what_recap_run_takes(tmp_path: Path) -> None:
    found: list[Job] = plan_jobs(all_passes(cluster(tmp_path, 1, {}).run))
    assert [job.title for job in found] == ["ingest", "caption", "score", "filter", "export"]
