"""Job scripts as text, dependencies between jobs, and strict parsing of `[slurm]`; no Slurm is needed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import parse_time_limit
from pipeline.errors import ConfigError, RefusedError
from pipeline.execution.pass_graph import list_passes
from pipeline.slurm import scheduler
from pipeline.slurm.blocks import Job, find_block, plan_jobs
from pipeline.slurm.jobs import JobMonitor
from pipeline.slurm.script import JobArray, SlurmRun
from pipeline.slurm.submit import Submission, find_queued_blocks
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


def slurm_run(folder: Path, num_shards: int, slurm: dict[str, Any], **changes: Any) -> SlurmRun:
    run = write(folder / "run", sections(folder, **changes) | {"slurm": slurm})
    return SlurmRun(run=config.load(run), num_shards=num_shards)


@given(num_shards=st.integers(1, 300), data=st.data())
def test_find_block_agrees_with_parse_spec(num_shards: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, num_shards))
    for block in range(num):
        assert {find_block(shard, num, num_shards) for shard in parse_spec(f"{block}/{num}", num_shards)} == {block}


def test_documentation_shows_the_printed_script(tmp_path: Path) -> None:
    model = {"kind": "vllm", "model": "internlm/CapRL-3B"}
    slurm = slurm_run(tmp_path, 100_000, EXAMPLE, engines__captioner=model)
    (job,) = [job for job in plan_jobs(list_passes(slurm.run)) if job.title == "caption"]
    text = slurm.render_array(JobArray(job=job, offset=0, blocks=tuple(range(1000))))
    text = text.replace(str(tmp_path / "run"), "/data/runs/photos").replace(slurm.prefix, "recap-1a2b3c4d-")
    assert text in (ROOT / "docs" / "clusters.md").read_text(), text


def submit_missing(slurm_run: SlurmRun, **changes: Any) -> tuple[int, list[tuple[str, str]]]:
    """Submits to an empty queue, or one that has the blocks in `queued`; returns titles and dependencies."""
    submitted: list[tuple[str, str]] = []

    def submit(title: str, _: str, dependency: str) -> str:
        submitted.append((title, dependency))
        return str(100 + len(submitted))

    jobs = plan_jobs(list_passes(slurm_run.run))
    due: dict[str, Any] = {job.title: range(slurm_run.num_blocks) for job in jobs} | changes.pop("due", {})
    settings: dict[str, Any] = {"window": 1000, "queued": {}, "servers": {}} | changes
    submission = Submission(slurm_run=slurm_run, jobs=jobs, due=due, submit=submit, **settings)
    return submission.submit_missing(jobs), submitted


def test_stages_wait_for_the_same_block_and_the_dataset_card_for_all(tmp_path: Path) -> None:
    num, submitted = submit_missing(slurm_run(tmp_path, 12, {"gpus": 0}))
    assert num == 60
    assert submitted == [
        ("ingest", ""),
        ("caption", "aftercorr:101"),
        ("score", "aftercorr:101:102"),
        ("filter", "aftercorr:101:102:103"),
        ("export", "aftercorr:101:102:103:104"),
        ("export-whole", "afterok:105"),
    ]


def test_a_repartitioned_training_set_waits_for_the_samples_of_all_shards(tmp_path: Path) -> None:
    due: dict[str, Any] = dict.fromkeys(("ingest", "caption", "score", "filter"), ())
    slurm = slurm_run(tmp_path, 12, {"gpus": 0}, export={"shard_bytes": 10**9})
    _, submitted = submit_missing(slurm, due=due)
    assert submitted == [
        ("export:select", ""),
        ("export", "afterok:101"),
        ("export", "afterok:102"),
        ("export-whole", "afterok:102:103"),
    ]


def test_a_stage_that_reads_all_shards_waits_for_whole_arrays_and_then_for_its_first_task(tmp_path: Path) -> None:
    later: dict[str, Any] = {"score": (), "filter": (), "export": ()}
    _, submitted = submit_missing(slurm_run(tmp_path, 12, {"gpus": 0}, curate={}), window=8, due=later)
    assert submitted == [
        ("ingest", ""),
        ("ingest.1", ""),
        ("curate", "afterok:101:102"),
        ("curate", "afterok:103"),
        ("curate.1", "afterok:103"),
        ("caption", "aftercorr:101:103"),
        ("caption", "aftercorr:101:104"),
        ("caption.1", "aftercorr:102:105"),
    ]


def test_windows_of_a_throttled_stage_run_in_sequence(tmp_path: Path) -> None:
    _, submitted = submit_missing(slurm_run(tmp_path, 12, {"max_running": 3}), window=5, due={"caption": ()})
    assert submitted[:4] == [
        ("ingest", ""),
        ("ingest.1", "afterany:101"),
        ("ingest.2", "afterany:102"),
        ("score", "aftercorr:101"),
    ]


def test_queued_blocks_become_dependencies_and_are_not_submitted_again(tmp_path: Path) -> None:
    slurm = slurm_run(tmp_path, 4, {})
    queued = {("caption", block): "7" for block in (0, 1)}
    _, submitted = submit_missing(slurm, queued=queued, due={"ingest": (), "caption": (0, 1, 2)})
    assert submitted[:4] == [
        ("caption", ""),
        ("score", "aftercorr:103"),
        ("score", "aftercorr:7"),
        ("score", ""),
    ] or submitted[:4] == [("caption", ""), ("score", ""), ("score", "aftercorr:101"), ("score", "aftercorr:7")]


def test_served_engine_has_a_job_released_after_its_last_user(tmp_path: Path) -> None:
    judge = {"kind": "openai", "model": "judge", "base_url": "endpoint"}
    slurm = slurm_run(tmp_path, 2, {"serve": ["judge"]}, engines__judge=judge)
    _, submitted = submit_missing(slurm)
    assert ("serve-judge", "") in submitted
    assert ("score", "aftercorr:101:102,after:103") in submitted
    assert submitted[-1] == ("release-judge", "afterany:104")
    assert "scancel 103" in slurm.render_release("judge", "103")
    assert "--gres" in slurm.render_server("judge")
    score = next(job for job in plan_jobs(list_passes(slurm.run)) if job.title == "score")
    text = slurm.render_array(JobArray(job=score, offset=0, blocks=(0, 1)))
    assert "--gres" not in text
    assert f"[ -e {slurm.endpoint('judge')} ] && break" in text
    assert f"squeue --noheader --name={slurm.prefix}serve-judge" in text


OPENAI = {"kind": "openai", "model": "judge", "base_url": "endpoint"}


@pytest.mark.parametrize(
    ("engine", "slurm", "says"),
    [
        (OPENAI, {"serve": ["jugde"]}, ["slurm.serve", "did you mean 'judge'"]),
        (OPENAI, {"serve": ["judge"]}, ["engines.judge", "on 0.0.0.0 anyone could send it requests", "api_key_env"]),
        ({**OPENAI, "base_url": "http://a/v1"}, {"serve": ["judge"]}, ["engines.judge", 'base_url = "endpoint"']),
        ({"kind": "vllm", "model": "judge"}, {"serve": ["judge"]}, ["engines.judge", 'kind = "openai"']),
        (OPENAI, {"serve": ["judge"], "serve_host": "127.0.0.1"}, []),
        ({**OPENAI, "api_key_env": "JUDGE_KEY"}, {"serve": ["judge"]}, []),
    ],
)
def test_unusable_served_engine_is_named(
    tmp_path: Path, engine: dict[str, Any], slurm: dict[str, Any], says: list[str]
) -> None:
    parts = {**sections(corpus(tmp_path / "photos", ["jpg"])), "engines.judge": engine, "slurm": slurm}
    run = begin(tmp_path / "run", parts)
    done = recap("slurm", "script", "score", "--run", run, check=False)
    assert done.returncode == (2 if says else 0)
    assert all(word in done.stderr for word in says), done.stderr


def fake_slurm(folder: Path, queued: str) -> dict[str, str]:
    """Stand-ins for Slurm's commands: `queued` is the output of squeue, and sbatch accepts every job."""
    commands = {"squeue": f"printf %s '{queued}'", "sbatch": "cat > /dev/null; echo 100", "scontrol": "true"}
    folder.mkdir()
    for name, command in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_endpoint_file_of_a_running_server_stays_when_its_engine_is_named_like_a_stage(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"]), caption__dense={"engine": "caption"})
    parts |= {"engines.caption": {**OPENAI, "api_key_env": "KEY"}, "slurm": {"serve": ["caption"]}}
    run = begin(tmp_path / "run", parts)
    slurm = SlurmRun(run=config.load(run), num_shards=1)
    endpoint = slurm.endpoint("caption")
    endpoint.parent.mkdir()
    endpoint.write_text("{}")
    env = fake_slurm(tmp_path / "bin", f"77|N/A|RUNNING|node|{slurm.prefix}serve-caption|None|(null)")
    stderr = recap("slurm", "submit", "caption", "ingest", "--run", run, **env).stderr
    assert "100: caption, after" in stderr and "serve-caption" not in stderr
    assert endpoint.exists()


def test_status_finds_running_and_ended_tasks_by_their_comment(tmp_path: Path) -> None:
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
        ("blocks=4,offset=2,shards=11", ["4 blocks of 11 shards", "4 of 12: wait for it or `scancel` it"]),
    ],
)
def test_queued_task_with_other_blocks_is_refused(tmp_path: Path, comment: str, says: list[str]) -> None:
    slurm = slurm_run(tmp_path, 12, {"num_tasks": 4})
    name, fields = f"{slurm.prefix}caption", {"state": "PENDING", "node": "", "reason": "Priority"}
    task = scheduler.QueuedTask(array="7", index=1, name=name, comment=comment, **fields)
    if not says:
        assert find_queued_blocks(slurm, [task]) == {("caption", 3): "7"}
        return
    with pytest.raises(RefusedError) as error:
        find_queued_blocks(slurm, [task])
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
def test_gpus_must_match_the_processes(
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


def test_num_workers_counts_the_workers_of_all_tasks(tmp_path: Path) -> None:
    slurm = slurm_run(tmp_path, 8, {"num_tasks": 2}, slurm__ingest={"workers": 3})
    passes = list_passes(slurm.run)
    fields = {"name": f"{slurm.prefix}ingest", "comment": "blocks=2,offset=0,shards=8", "node": "n", "reason": ""}
    tasks = tuple(scheduler.QueuedTask(array="7", index=index, state="RUNNING", **fields) for index in (0, 1))
    monitor = JobMonitor(slurm_run=slurm, jobs=tuple(plan_jobs(passes)), tasks=tasks, problem="")
    num_workers = {p.title: monitor.num_workers(p) for p in passes}
    assert (num_workers["ingest"], num_workers["filter"]) == (6, 0)


def test_workers_without_shards_are_named(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 8), source={"shard_size": 1})
    slurm = {"slurm.caption": {"gpus": 2, "workers": 2}}
    run = begin(tmp_path / "run", parts | slurm | {"engines.captioner": {"kind": "vllm", "model": "m"}})
    stderr = recap("slurm", "script", "caption", "--run", run).stderr
    assert "a task has 1 shard for 2 workers; set slurm.num_tasks = 4 or less" in stderr


def test_several_scripts_are_refused_by_sbatch_as_one_file(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"])))
    text = recap("slurm", "script", "ingest", "caption", "--run", run).stdout
    assert text.startswith("# ingest: script 1 of 2")
    assert "\n# caption: script 2 of 2, a file of its own\n#!/bin/bash\n" in text


@pytest.mark.parametrize("name", ["a\nb", 'a"b', "a\\b", "a\x1b[2Jb"])
def test_a_path_that_job_scripts_cannot_hold_is_refused_on_one_line(tmp_path: Path, name: str) -> None:
    run = begin(tmp_path / name / "run", sections(corpus(tmp_path / "photos", ["jpg"])))
    done = recap("slurm", "script", "ingest", "--run", run, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "rename it" in done.stderr and done.stderr[:-1].isprintable()


def test_a_single_quote_and_spaces_in_the_path_are_quoted(tmp_path: Path) -> None:
    run = begin(tmp_path / "it's a run", sections(corpus(tmp_path / "photos", ["jpg"])))
    script = recap("slurm", "script", "ingest", "--run", run).stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"--run {shlex.quote(str(run))}" in script


def test_job_ignores_a_pipeline_package_in_its_working_directory(tmp_path: Path) -> None:
    slurm = slurm_run(tmp_path, 1, {})
    text = slurm.render_array(JobArray(job=plan_jobs(list_passes(slurm.run))[0], offset=0, blocks=(0,)))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit(3)")
    (command,) = (line.partition(" run ingest")[0] for line in text.splitlines() if " run ingest" in line)
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([*command.split(), "--help"], cwd=tmp_path, env=env, capture_output=True).returncode == 0


def test_window_adds_its_offset(tmp_path: Path) -> None:
    slurm = slurm_run(tmp_path, 12, {})
    job = plan_jobs(list_passes(slurm.run))[0]
    text = slurm.render_array(JobArray(job=job, offset=5, blocks=(5, 6, 9)))
    assert "#SBATCH --array=0-1,4\n" in text
    assert "block=$((SLURM_ARRAY_TASK_ID + 5))" in text


def test_interrupted_stage_has_one_job_per_pass(tmp_path: Path) -> None:
    second = {"recipe": "short", "engine": "captioner", "of": "dense", "where": "judge < 0.5"}
    slurm = slurm_run(tmp_path, 3, {}, caption__again=second, score__judge={"captions": ["dense"]})
    titles = [job.title for job in plan_jobs(list_passes(slurm.run))]
    assert titles.index("caption:dense") < titles.index("caption:again")
    assert not {"caption", "score"} & {job.title for job in plan_jobs(list_passes(slurm.run)) if "again" in job.title}


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({"partion": "gpu"}, ["slurm.partion", "unknown key", "did you mean 'partition'"]),
        ({"captoin": {"gpus": 2}}, ["slurm.captoin", "unknown key", "did you mean 'caption'"]),
        ({"caption": {"gpu": 2}}, ["slurm.caption.gpu", "unknown key"]),
        ({"time": "four hours"}, ["slurm.ingest.time", "'four hours'", "04:00:00"]),
        ({"time": "00:04:00"}, ["time", "must be longer than notice = 300 s"]),
        ({"gpus": -1}, ["gpus", "-1", "the minimum is 0"]),
        ({"server": {"workers": 2}}, ["slurm.server.workers", "replicas"]),
    ],
)
def test_invalid_section_is_named(tmp_path: Path, slurm: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        slurm_run(tmp_path, 1, slurm)
    assert all(word in str(error.value) for word in says), error.value


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("1-12", 129600), ("1-12:30:00", 131400), ("soon", None)],
)
def test_time_limits_parse_as_slurm_parses_them(limit: str, seconds: int | None) -> None:
    assert parse_time_limit(limit) == seconds


@pytest.mark.slow
def test_finished_run_needs_no_jobs(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4)))
    assert recap("slurm", "script", "caption", "--run", run).stdout.startswith("#!/bin/bash\n#SBATCH --job-name=recap-")
    recap("run", "all", "--run", run)
    script = recap("slurm", "script", "--run", run)
    assert (script.stdout, script.stderr) == ("", "nothing is missing: there is no job to submit\n")


@pytest.mark.slow
def test_stale_tables_are_not_submitted_by_default(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 4))
    run = begin(tmp_path / "run", parts)
    make(run)
    write(run, parts | {"caption.dense": {"recipe": "short", "engine": "captioner"}})
    done = recap("slurm", "script", "--run", run, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stale: caption:dense (1 shard)" in done.stderr
    redone = recap("slurm", "script", "caption", "--stale", "redo", "--run", run).stdout
    assert "--stale redo" in redone


def test_job_titles_are_arguments_of_recap_run(tmp_path: Path) -> None:
    found: list[Job] = plan_jobs(list_passes(slurm_run(tmp_path, 1, {}).run))
    assert [job.title for job in found] == ["ingest", "caption", "score", "filter", "export"]
