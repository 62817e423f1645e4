"""On a real Slurm: whatever a cluster does to a run, its tables are those of one undisturbed process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import start_cluster
from tests.support.faults import Faulty
from tests.support.runs import ROOT, begin, corpus, files, make, sections, write

pytestmark = pytest.mark.slurm

PATIENCE = 900.0  # seconds; reached by a failure alone, however slow the machine is


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster whose arrays hold five tasks at most."""
    with start_cluster(tmp_path_factory.mktemp("slurm"), max_array_size=5) as found:
        yield {**found, "PYTHONPATH": str(ROOT)}


class Submitted:
    """A run on the cluster, as a user handles it."""

    def __init__(self, folder: Path, env: dict[str, str], parts: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder, self.env = begin(folder, parts), env

    def recap(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *args, "--run", str(self.folder)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)

    def submit(self) -> list[str]:
        """Submits; returns the lines on stderr."""
        done = self.recap("slurm", "submit")
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    def status(self) -> dict[str, dict[str, Any]]:
        return {p["title"]: p for p in json.loads(self.recap("status", "--json").stdout)}

    def find_running(self, title: str, shards: set[str]) -> list[dict[str, Any]]:
        """The running tasks of a pass by `recap status`, once they work on all of these shards; else none."""
        found: list[dict[str, Any]] = self.status()[title]["running"]
        return found if shards <= {task["shards"] for task in found} else []

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def queue(self) -> list[tuple[str, str, str]]:
        """Job name, task and state of every queued or running task."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%j|%F_%K|%T").splitlines()
        return [(name.split("-", 2)[2], task, state) for name, task, state in (line.split("|") for line in lines)]

    def wait_for(self, what: str, happens: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := happens():
                return found
            time.sleep(0.3)
        raise AssertionError(
            f"{what} did not happen within {PATIENCE} s; the queue: {self.queue()}\n{self.read_logs()}"
        )

    def wait_until_empty(self) -> None:
        self.wait_for("an empty queue", lambda: not self.queue())

    def task(self, stage: str, index: int) -> str:
        """The id of a task in the first window of a stage."""
        return next(task for name, task, _ in self.queue() if name == stage and task.endswith(f"_{index}"))

    def read_logs(self) -> str:
        logs = sorted((self.folder / "slurm" / "logs").glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text()}" for log in logs)

    def process(self, what: str, listens_to: int = signal.SIGUSR1) -> int | None:
        """The process of a task of this run, by its command line, once it handles a signal."""
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = place.read_bytes().split(b"\0")
                caught = int(re.findall(r"SigCgt:\s*(\w+)", (place.parent / "status").read_text())[0], 16)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if (
                b"pipeline" in words
                and what.encode() in b" ".join(words)
                and str(self.folder).encode() in words
                and caught >> (listens_to - 1) & 1
            ):
                return int(place.parent.name)
        return None


def processes() -> Iterator[tuple[int, str]]:
    """Every process of this machine, by its number, with its command line."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield int(place.parent.name), place.read_text(errors="replace")


def expected(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The tables of a plain `recap run all`."""
    run = begin(folder / "run", parts)
    assert make(run).exit_code == 0
    return tables(run)


def tables(run: Path) -> dict[str, bytes]:
    return files(run, without=("stats", ".work", "slurm", "run.toml"))


def settings(folder: Path, num_shards: int, **slurm: Any) -> dict[str, dict[str, Any]]:
    kinds = ["jpg", "png", "cut", "webp", "jpg", "png", "jpg", "jpg", "empty", "jpg"]
    parts = sections(corpus(folder / "photos", kinds * num_shards), caption__dense={"num_candidates": 2})
    return parts | {"slurm": {"gpus": 0, "cpus": 1, **slurm}}


def test_throttled_windows_submitted_twice(tmp_path: Path, env: dict[str, str]) -> None:
    parts = settings(tmp_path, 7, max_running=3)
    run = Submitted(tmp_path / "run", env, parts)
    assert run.submit()[-1] == "35 tasks submitted"
    windows = Counter(re.split(r"[.-]", path.name)[0] for path in (run.folder / "slurm").glob("*-[0-9]*.sh"))
    assert windows == {"ingest": 2, "caption": 2, "score": 2, "filter": 2, "export": 3}  # 5 + 2 tasks, and the card
    assert run.submit() == ["nothing to submit: everything is done or queued"]
    most: Counter[str] = Counter()

    def watched() -> bool:
        seen = run.queue()
        tasks = [(name, task) for name, task, _ in seen]
        assert len(tasks) == len(set(tasks))
        for name, num in Counter(name for name, _, state in seen if state == "RUNNING").items():
            most[name] = max(most[name], num)
        return not seen

    run.wait_for("an empty queue", watched)
    assert max(most.values()) == 3
    assert tables(run.folder) == expected(tmp_path / "plain", parts), run.read_logs()
    assert run.submit() == ["nothing to submit: everything is done or queued"]
    assert all(p["done"] == 7 and not p["missing"] for p in run.status().values())


def test_requeued_and_killed_tasks_leave_only_missing_shards_to_submit(tmp_path: Path, env: dict[str, str]) -> None:
    parts = settings(tmp_path, 4)
    parts["engines.captioner"] = {"kind": "echo", "delay": 1.0}
    run = Submitted(tmp_path / "run", env, parts)
    assert run.submit()[-1] == "20 tasks submitted"
    run.wait_for("task 0", lambda: run.process("run caption --shard 0/4"))
    victim = run.wait_for("task 1", lambda: run.process("run caption --shard 1/4"))
    running = run.wait_for("a status with both", lambda: run.find_running("caption:dense", {"0", "1"}))
    assert {task["node"] for task in running} != {""}
    requeued = run.task("caption", 0)
    run.ask("scontrol", "requeue", requeued)
    os.kill(victim, signal.SIGKILL)
    run.wait_until_empty()
    log = (run.folder / "slurm" / "logs" / f"caption-{requeued}.log").read_text()
    assert re.search(r"SIG(TERM|USR1): finishing", log)
    assert "1 shard table made" in log
    status = run.status()
    assert {p["missing"] for p in status.values()} == {"", "1"}
    assert {title.split(":")[0] for title, p in status.items() if p["missing"]} == {
        *("caption", "score", "filter", "export")
    }
    assert "ended early" in status["caption:dense"]["failures"]["00001"]
    lines = run.submit()
    assert lines[-1] == "4 tasks submitted"
    assert [line.split(", ")[0].split(": ")[1] for line in lines[:-1]] == [
        *("caption", "score", "filter", "export", "export-whole")
    ]
    run.wait_until_empty()
    assert tables(run.folder) == expected(tmp_path / "plain", parts | {"engines.captioner": {"kind": "echo"}})


def test_signalled_task_stops_and_is_requeued_alone(tmp_path: Path, env: dict[str, str]) -> None:
    parts = settings(tmp_path, 2, time="00:10:00", notice=60)
    parts["source"]["shard_size"] = 5
    parts["engines.captioner"] = {"kind": "echo", "delay": 2.0}
    run = Submitted(tmp_path / "run", env, parts)
    run.submit()
    run.wait_for("task 0", lambda: run.process("run caption --shard 0/4"))
    time.sleep(1.5)
    signalled = run.task("caption", 0)
    before = {task for name, task, state in run.queue() if name == "caption" and state == "RUNNING"} - {signalled}
    run.ask("scancel", "--batch", "--signal=USR1", signalled)  # what --signal=B:USR1@60 does a minute before the end
    log = run.folder / "slurm" / "logs" / f"caption-{signalled}.log"
    run.wait_for("leaving", lambda: "stopped, the same command resumes" in log.read_text())

    def states() -> dict[str, str]:
        return {task: state for name, task, state in run.queue() if name == "caption"}

    run.wait_for("coming back", lambda: states().get(signalled) in ("PENDING", "COMPLETING"))
    assert all(states().get(other, "done") in ("RUNNING", "COMPLETING", "done") for other in before)
    run.wait_until_empty()
    assert re.search(r"SIGUSR1.*stopped, the same command resumes.*1 shard table made", log.read_text(), re.DOTALL)
    assert tables(run.folder) == expected(tmp_path / "plain", parts | {"engines.captioner": {"kind": "echo"}})


def test_cancelled_tasks_stay_cancelled_and_requeues_are_bounded(tmp_path: Path, env: dict[str, str]) -> None:
    parts = settings(tmp_path, 2, max_requeues=0)
    parts["engines.captioner"] = {"kind": "echo", "delay": 1.5}
    run = Submitted(tmp_path / "run", env, parts)
    run.submit()
    run.wait_for("task 0", lambda: run.process("run caption --shard 0/2"))
    run.wait_for("task 1", lambda: run.process("run caption --shard 1/2"))
    time.sleep(1.5)
    run.ask("scancel", run.task("caption", 0))
    signalled = run.task("caption", 1)
    run.ask("scancel", "--batch", "--signal=USR1", signalled)
    run.wait_until_empty()  # dependent jobs are gone too
    assert "not queued again" in (run.folder / "slurm" / "logs" / f"caption-{signalled}.log").read_text()
    assert run.status()["filter"]["missing"] == "0-1", run.read_logs()
    assert run.submit()[-1] in ("8 tasks submitted", "7 tasks submitted")  # its last rows may have been in flight
    run.wait_until_empty()
    assert tables(run.folder) == expected(tmp_path / "plain", parts | {"engines.captioner": {"kind": "echo"}})


def test_served_judge_starts_before_its_array_and_ends_after_it(tmp_path: Path, env: dict[str, str]) -> None:
    name = f"judge-of-{tmp_path.name}-{os.getpid()}"
    judge = {"kind": "openai", "model": name, "base_url": "endpoint", "api_key_env": "JUDGE_KEY", "give_up_after": 60.0}
    parts = settings(tmp_path, 2, serve=["judge"], serve_host="127.0.0.1")
    parts |= {"engines.judge": judge, "engines.judge.serve": {"dtype": "float32", "args": ["--no-such-model"]}}
    standin = {"PYTHONPATH": f"{ROOT / 'tests' / 'slurm' / 'standin'}:{ROOT}", "JUDGE_KEY": "sesame-1234"}
    run = Submitted(tmp_path / "run", {**env, **standin}, parts)
    endpoint = run.folder / "endpoints" / "judge.json"
    endpoint.parent.mkdir()
    endpoint.write_text('{"base_url": "http://127.0.0.1:9/v1"}')  # of a server that has ended

    run.submit()
    run.wait_until_empty()  # dependent jobs are gone too
    assert "there is no such model" in run.read_logs()
    status = run.status()
    assert {title: p["missing"] for title, p in status.items() if p["missing"]}.keys() == {
        *("score:form:dense", "score:judge:dense", "filter", "export")
    }
    assert "no server of judge" in status["score:judge:dense"]["failures"]["00000"], status

    write(run.folder, parts | {"engines.judge.serve": {"dtype": "float32"}})
    assert run.submit()[-1] == "6 tasks submitted"
    serving = run.wait_for("a server", lambda: endpoint.exists() and run.process("serve judge", signal.SIGTERM))
    model = next(pid for pid, words in processes() if name in words)
    run.wait_until_empty()
    assert not endpoint.exists()
    assert {serving, model}.isdisjoint(pid for pid, _ in processes())
    assert "sesame" not in run.read_logs() + "".join(path.read_text() for path in run.folder.glob("slurm/*.sh"))
    with Faulty() as server:
        plain = {"engines.judge": {**judge, "base_url": server.url, "api_key_env": ""}}
        assert tables(run.folder) == expected(tmp_path / "plain", parts | plain), run.read_logs()
