"""Worker processes: they divide a node, make the tables of one process, and lose no shard with a killed worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, RefusedError, WorkerDiedError
from pipeline.execution import runner as machine
from pipeline.execution.workers import VISIBLE, NodeShare, WorkerPool, divide_node, name_devices
from tests.support import tiny
from tests.support.runs import ROOT, begin, corpus, files, make, sections, write


@pytest.mark.parametrize(
    ("num", "given", "names"),
    [
        (0, None, []),
        (2, None, ["0", "1"]),
        (2, "3,1", ["3", "1"]),
        (2, "GPU-5a, MIG-9c", ["GPU-5a", "MIG-9c"]),
        (0, "", []),
        (1, "2,-1,3", ["2"]),  # CUDA sees none after the first that there is not
        (0, "0,1", []),  # of a machine that has none
    ],
)
def test_devices_keep_the_names_of_cuda_visible_devices(num: int, given: str | None, names: list[str]) -> None:
    assert name_devices(num, given) == names


def test_a_node_is_divided_into_contiguous_parts() -> None:
    found = divide_node(3, cores=range(8), devices=["4", "5", "6"])
    assert [share.devices for share in found] == [("4",), ("5",), ("6",)]
    assert [share.cores for share in found] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [share.devices for share in divide_node(2, cores=[0], devices=list("0123"))] == [("0", "1"), ("2", "3")]
    assert divide_node(2, cores=[0], devices=[]) == [NodeShare(), NodeShare()]


class EchoJob:
    """A job that does what its task names, and returns its process, cores and devices."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def do(self, task: str, send: Callable[[Any], None]) -> Any:
        send(task)
        if task == "fail":
            raise ConfigError("run.toml: a.field", "is wrong")
        if task == "wait":
            assert self._stopped.wait(60)
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), tuple(sorted(os.sched_getaffinity(0))), os.environ.get(VISIBLE)

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_each_worker_has_cores_and_devices_of_its_own() -> None:
    core = min(os.sched_getaffinity(0))
    pool, messages = (
        WorkerPool(EchoJob, [NodeShare(devices=("3",)), NodeShare(devices=("0", "1"), cores=(core,))]),
        list[str](),
    )
    tasks = [pool.submit(task, on_progress=messages.append) for task in ("wait", "wait")]
    pool.stop()
    (first, cores, devices), (second, other_cores, other_devices) = (task.result(60) for task in tasks)
    assert first != second
    assert (set(cores), other_cores) == (os.sched_getaffinity(0), (core,))
    assert (devices, other_devices, messages) == ("3", "0,1", ["wait", "wait"])
    pool.shutdown()
    assert VISIBLE not in os.environ


@pytest.mark.slow
def test_errors_of_workers_are_raised_with_their_traceback() -> None:
    pool = WorkerPool(EchoJob, [NodeShare()])
    with pytest.raises(ConfigError, match=r"a\.field: is wrong") as raised:
        pool.submit("fail", on_progress=print).result(60)
    assert any('raise ConfigError("run.toml' in note for note in raised.value.__notes__)
    assert pool.submit("work", on_progress=print).result(60)
    pool.shutdown()


@pytest.mark.slow
def test_a_killed_worker_fails_only_its_own_tasks() -> None:
    pool = WorkerPool(EchoJob, [NodeShare(), NodeShare()])
    tasks: list[Future[Any]] = [pool.submit(task, on_progress=lambda _: None) for task in ("die", "work", "work")]
    with pytest.raises(WorkerDiedError, match="fewer --workers"):
        tasks[0].result(60)
    assert tasks[1].result(60)
    with pytest.raises(WorkerDiedError):
        tasks[2].result(60)
    pool.shutdown()


@pytest.mark.slow
def test_two_workers_with_a_model_each_make_the_tables_of_one_process(tmp_path: Path, tiny_model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(12):
        (photos / f"{n:02d}.png").write_bytes(tiny.make_picture(n))
    # One question at a time, for a batch's neighbours move the last bits.
    model = {"kind": "transformers", "model": str(tiny_model), "dtype": "float32", "batch_size": 1}
    parts = sections(photos, source={"shard_size": 3}, engines__captioner=model, caption__dense={"recipe": "tiny"})
    made = []
    for workers in (1, 2):
        run = begin(tmp_path / f"run{workers}", parts, max_error_share=1.0)
        (run / "recipes").mkdir()
        (run / "recipes" / "tiny.toml").write_text(
            'prompt = "Describe it."\n[sampling]\ntemperature = 1.0\nmax_tokens = 16\n'
        )
        make(run, "ingest")
        assert make(run, "caption", workers=workers).exit_code == 0
        made.append(files(run / "caption"))
    assert made[0] == made[1] and len(made[0]) == 4


@pytest.mark.slow
def test_each_worker_keeps_its_engine_and_overlaps_two_shards(tmp_path: Path) -> None:
    """The engine answers only once two calls overlap, so shards made one after the other would hang."""
    record = tmp_path / "record"
    photos = corpus(tmp_path / "photos", ["jpg"] * 16)
    engine = {"kind": "tests.support.recording", "name": "captioner", "record": str(record), "overlap": 2}
    run = write(tmp_path / "run", {**sections(photos, source={"shard_size": 2}), "engines.captioner": engine})
    begin_and_caption(run)
    counts = Counter(record.read_text().splitlines())
    assert counts == {"open captioner": 2, "close captioner": 2, "generate captioner": 8}


def begin_and_caption(run: Path) -> None:
    from pipeline import config
    from pipeline.commands import init

    init.extend_plan(config.load(run))
    make(run, "ingest")
    assert make(run, "caption", workers=2).exit_code == 0


@pytest.mark.slow
def test_a_run_whose_workers_are_killed_fails_and_resumes(tmp_path: Path) -> None:
    child, run = start_two_workers(tmp_path)
    os.kill(list_workers(child.pid)[0], signal.SIGKILL)
    _, words = child.communicate(timeout=120)
    assert (child.returncode, "fewer --workers" in words) == (1, True)
    assert make(run, "caption", workers=2).exit_code == 0


@pytest.mark.slow
def test_a_signal_reaches_the_workers(tmp_path: Path) -> None:
    child, run = start_two_workers(tmp_path)
    child.send_signal(signal.SIGTERM)
    _, words = child.communicate(timeout=120)
    assert child.returncode == 75, words
    assert make(run, "caption").exit_code == 0


def start_two_workers(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Starts captioning with two workers and more shards than can be in flight."""
    photos = corpus(tmp_path / "photos", ["jpg"] * 80)
    run = begin(tmp_path / "run", sections(photos, source={"shard_size": 5}, engines__captioner={"delay": 0.3}))
    make(run, "ingest")
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "caption", "--run", str(run), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / ".work" / "caption").exists():
        time.sleep(0.05)
    return child, run


def list_workers(pid: int) -> list[int]:
    """The worker processes of a process, without multiprocessing's own helper."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(n) for n in found if b"spawn_main" in Path(f"/proc/{n}/cmdline").read_bytes()]


def test_more_workers_than_devices_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"])
    parts = sections(photos)
    parts["engines.captioner"] = {"kind": "vllm", "model": "some/model"}
    run = begin(tmp_path / "run", parts)
    monkeypatch.setattr(machine, "visible_devices", lambda: ["4", "5"])
    with pytest.raises(
        RefusedError, match=r"--workers 3: .* captioner, and 2 are visible \(CUDA_VISIBLE_DEVICES=4,5\)"
    ):
        make(run, "caption", workers=3)
