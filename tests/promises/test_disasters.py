"""Disasters end with a clear message and exit 1, leave no unfinished file in place, and a rerun completes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import disasters, races, runs, shortages, syscalls
from tests.support.runs import ROOT, begin, corpus, make, sections, times, write

pytestmark = pytest.mark.slow

NUM_ROWS = 150  # of a killed run, at least, in all of its tables
IMAGES = ["jpg", "png", "cut", "jpg", "jpg", "webp", "jpg", "jpg", "png", "jpg", "jpg", "jpg"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was never interrupted."""
    folder = tmp_path_factory.mktemp("quiet")
    run = begin(folder / "run", sections(corpus(folder / "photos", IMAGES), source={"shard_size": 6, "pack": True}))
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    """The same run, not started."""
    (tmp_path / "run").mkdir()
    for name in ("run.toml", "plan.parquet"):
        shutil.copy(reference / name, tmp_path / "run" / name)
    return tmp_path / "run"


def recap(run: Path, what: str = "all", *options: str, under: str = "") -> subprocess.CompletedProcess[str]:
    """The command line; in a process of its own after the shell commands of `under`, if there are any."""
    if not under:
        return runs.recap("run", what, "--run", run, *options, check=False)
    command = shlex.join([sys.executable, "-m", "pipeline", "run", what, "--run", str(run), *options])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", f"{under} {command}"], capture_output=True, text=True, env=env, check=False)


def assert_rerun_completes(run: Path, reference: Path) -> None:
    assert recap(run).returncode == 0
    toll = disasters.Toll(kills_by_stage={})
    disasters.compare(reference, run, toll, alike=True, but=(".broken",))
    assert (toll.harm, toll.rows > 0) == (0, True), toll


def assert_clean_failure(done: subprocess.CompletedProcess[str], run: Path, *says: str) -> None:
    assert done.returncode == 1, done.stderr
    assert all(word in done.stderr for word in says), done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in run.rglob("*.tmp") if ".work" not in path.parts]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("echo", 4), ("server", 2), ("transformers", 1)],
)
def test_killed_runs_lose_and_double_no_rows(kind: str, kills: int) -> None:
    toll = disasters.kill_runs_of(kind, kills=kills, seed=1)
    assert (toll.kills >= kills, toll.harm) == (True, 0), toll
    assert toll.rows > NUM_ROWS * toll.runs > 0


def test_a_shard_made_by_several_processes_at_once_is_whole(run: Path, reference: Path) -> None:
    for stage in disasters.STAGES:
        processes = [disasters.start(run, stage) for _ in range(3)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 3, stage
    assert_rerun_completes(run, reference)


@pytest.mark.faults
def test_stages_that_fail_or_are_killed_at_a_system_call_lose_nothing(tmp_path: Path) -> None:
    toll = syscalls.break_calls(tmp_path, every=13)
    assert (toll.harm, toll.kills > 0, toll.errors > 0) == (0, True, True), toll


def test_commands_that_race_lose_and_double_nothing(tmp_path: Path) -> None:
    toll = races.race(tmp_path, rounds=1)
    assert (toll.harm, toll.rows > 50) == (0, True), toll


@pytest.mark.faults
def test_a_failed_allocation_is_not_taken_for_damage() -> None:
    done = shortages.run_alone(num_steps=12)
    shortage = json.loads(done.stdout)
    assert (done.returncode, shortage["taken_for_damage"]) == (0, 0), done
    assert shortage["tasks"] == 60 and shortage["refused"] > 5 < shortage["places"]


def test_a_full_disk(run: Path, reference: Path) -> None:
    alone = "export PYTHONDONTWRITEBYTECODE=1; ulimit -f 4;"  # compiled code would be cut too, and stay cut for all
    assert_clean_failure(recap(run, under=alone), run, "ingest 00000 failed", "File too large")
    assert not [*run.glob("image/*"), *run.glob("shards/*")]
    assert_rerun_completes(run, reference)


def test_a_read_only_folder(run: Path, reference: Path) -> None:
    mine = "setpriv --bounding-set=-all --inh-caps=-all" if os.geteuid() == 0 else ""  # root may write anywhere
    assert make(run, "ingest").exit_code == 0
    run.chmod(0o555)
    assert_clean_failure(recap(run, under=f"{mine}"), run, "caption:dense 00000 failed", "Permission denied")
    run.chmod(0o755)
    assert_rerun_completes(run, reference)


def test_too_few_file_handles(run: Path, reference: Path) -> None:
    assert_clean_failure(recap(run, "all", "--no-check", under="ulimit -n 7;"), run, "Too many open files")
    assert_rerun_completes(run, reference)


@pytest.mark.parametrize("table", ["image", "caption/dense", "score/judge/dense", "verdict", "export/index"])
def test_a_truncated_table_is_made_again(run: Path, reference: Path, table: str) -> None:
    assert make(run).exit_code == 0
    path = run / table / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    done = recap(run)
    assert done.returncode == 0
    assert f"{path} is not a whole Parquet file; it is made again" in done.stderr
    assert_rerun_completes(run, reference)


@pytest.mark.parametrize(
    ("table", "next_stage"), [("image", "caption"), ("caption/dense", "score"), ("verdict", "export")]
)
def test_a_flipped_byte_is_noticed_by_the_next_stage(run: Path, reference: Path, table: str, next_stage: str) -> None:
    stage = disasters.STAGES[disasters.STAGES.index(next_stage) - 1]
    for one in disasters.STAGES[: disasters.STAGES.index(stage) + 1]:
        assert make(run, one).exit_code == 0
    path = run / table / "00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 16]) + whole[61:])
    assert_clean_failure(recap(run, next_stage), run, str(path), "it is now 00001.parquet.broken")
    assert (run / table / "00001.parquet.broken").exists()
    assert_rerun_completes(run, reference)


def test_a_changed_tar_of_images(run: Path, reference: Path) -> None:
    assert make(run, "ingest").exit_code == 0
    tar = run / "shards" / "00001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert_clean_failure(recap(run), run, "shards/00001.tar", "changed since ingest")
    assert_rerun_completes(run, reference)


def test_a_stage_names_missing_images(run: Path, reference: Path) -> None:
    assert make(run, "ingest").exit_code == 0
    (run / "shards" / "00001.tar").unlink()
    assert_clean_failure(recap(run, "caption"), run, "shards/00001.tar is missing; `recap run all --run")
    assert [path.name for path in (run / "caption" / "dense").iterdir()] == ["00000.parquet"]
    assert_rerun_completes(run, reference)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("shards/00001.tar", "ingest"),
        ("export/webdataset/00000.tar", "export"),
        ("export/parquet/00001.parquet", "export"),
    ],
)
@pytest.mark.parametrize("size", [None, 50])
def test_missing_and_truncated_payloads_are_made_again(
    run: Path, reference: Path, file: str, stage: str, size: int | None
) -> None:
    assert make(run).exit_code == 0
    captions = times(run / "caption")
    (run / file).unlink() if size is None else os.truncate(run / file, size)
    found = f"{file} is missing" if size is None else f"{file} has {size} bytes and was written with "
    lacking = {
        p["title"]: (p["num_missing"], p["failures"])
        for p in json.loads(runs.recap("status", "--json", "--run", run).stdout)
        if p["missing"]
    }
    assert lacking.keys() == {stage}
    num, failures = lacking[stage]
    assert num == 1 and all(why.startswith(found) for why in failures.values())
    done = recap(run)
    assert (done.returncode, "; it is made again" in done.stderr, found in done.stderr) == (0, True, True)
    assert "1 shard table made" in done.stderr
    assert times(run / "caption") == captions
    assert_rerun_completes(run, reference)


def join_calls(lines: Sequence[str]) -> list[str]:
    """The lines of a trace with the calls whole that another thread interrupts: syncs where they end, others where they
    begin."""
    begun: dict[str, int] = {}  # process -> its unfinished line
    whole: list[str] = []
    for line in lines:
        process, _, text = line.partition(" ")
        if resumed := re.match(r"\s*<\.\.\. (\w+) resumed>", text):
            at = begun.pop(process)
            call = whole[at].removesuffix(" <unfinished ...>") + text[resumed.end() :]
            is_sync = "sync" in resumed[1]
            whole[at] = "" if is_sync else call
            whole += [call] if is_sync else []
            continue
        if line.endswith("<unfinished ...>"):
            begun[process] = len(whole)
        whole.append(line)
    return whole


def test_calls_that_others_interrupt_are_whole() -> None:
    trace = ["1 fsync(3</a> <unfinished ...>", '2 rename("/b", "/c" <unfinished ...>', "1 <... fsync resumed>) = 0"]
    assert join_calls([*trace, "2 <... rename resumed>) = 0"])[1:] == ['2 rename("/b", "/c") = 0', "1 fsync(3</a>) = 0"]


@pytest.mark.faults
def test_files_and_new_folders_survive_a_power_failure(tmp_path: Path) -> None:
    """A file is synced before its rename, its folder after it, and the parent of each new folder too."""
    photos, run = corpus(tmp_path / "photos", IMAGES[:4]), tmp_path / "of" / "runs" / "run"
    trace = ["strace", "-f", "-y", "-q", "--seccomp-bpf", "-A", "-o", str(tmp_path / "trace")]
    trace += ["-e", "trace=mkdir,mkdirat,rename,fsync,fdatasync", sys.executable, "-m", "pipeline"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*trace, "init", run, "--source", photos], check=True, env=env)
    write(run, sections(photos, export={"formats": ["webdataset", "parquet", "captions", "sidecar"]}))
    subprocess.run([*trace, "run", "all", "--no-check", "--run", run], check=True, env=env)
    pattern = r'(mkdir|rename|fsync|fdatasync)(?:at)?\((?:\d+<(.*?)>|"(.*?)"(?:, "(.*?)")?).*= 0$'
    lines = "\n".join(join_calls((tmp_path / "trace").read_text().splitlines()))
    calls = [match.groups(default="") for match in re.finditer(pattern, lines, re.MULTILINE)]
    synced = [(number, call[1]) for number, call in enumerate(calls) if "sync" in call[0]]
    num_checked = 0
    for number, (call, _, path, target) in enumerate(calls):
        if "sync" in call or not (target or path).startswith(str(tmp_path)) or ".work" in Path(target or path).parts:
            continue
        assert any(later > number and other == str(Path(target or path).parent) for later, other in synced), path
        assert call == "mkdir" or any(earlier < number and other == path for earlier, other in synced), path
        num_checked += 1
    assert num_checked > 20
