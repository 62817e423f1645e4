"""Runs over servers that fail end with the rows of an undisturbed run."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.support import runs
from tests.support.faults import Faulty
from tests.support.served import ModelServer, start_server

pytestmark = pytest.mark.slow

NUM_PHOTOS = 24


def begin(folder: Path, photos: Path, server: Faulty, **changes: Any) -> Path:
    engine = {"kind": "openai", "model": "echo", "base_url": server.url, "max_in_flight": 4, "timeout": 60.0, **changes}
    return runs.begin(folder, runs.sections(photos, engines__captioner=engine, engines__judge=engine))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus") / "photos", ["jpg", "png", "webp"] * (NUM_PHOTOS // 3))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, bytes]:
    with Faulty() as server:
        run = begin(tmp_path_factory.mktemp("undisturbed") / "run", photos, server)
        assert runs.make(run).exit_code == 0
    return tables(run)


def tables(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in runs.files(run).items() if name.endswith((".parquet", ".tar"))}


def test_a_server_that_fails_at_a_tenth_of_all_requests(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes]
) -> None:
    with Faulty(share=0.1) as server:
        run = begin(tmp_path / "run", photos, server, timeout=2.0)
        assert runs.make(run).exit_code == 0
    assert server.seen.total() > server.seen[""]
    assert tables(run) == undisturbed


def test_a_server_that_is_killed_in_mid_shard_and_restarted(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes]
) -> None:
    with Faulty() as server:
        run = begin(tmp_path / "run", photos, server)
        runs.make(run, "ingest")
        with stopping_in_mid_shard(server) as stopped:
            stopped.add_done_callback(lambda _: threading.Timer(1.0, server.start).start())
            assert runs.make(run).exit_code == 0
    assert tables(run) == undisturbed


@contextmanager
def stopping_in_mid_shard(server: Faulty) -> Iterator[Future[None]]:
    """Stops the server after the first 8 requests of the block; it answers slowly until then."""
    server.delay = 0.1
    num_before = server.seen.total()

    def stop() -> None:
        while server.seen.total() < num_before + 8:
            time.sleep(0.01)
        server.stop()

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop)
        yield stopped
        stopped.result()


def test_a_server_that_stays_dead_ends_the_run_with_its_url_and_the_seconds_waited(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with Faulty() as server:
        run = begin(tmp_path / "run", photos, server, give_up_after=1.0)
        runs.make(run, "ingest")
        with stopping_in_mid_shard(server):
            assert runs.make(run).exit_code == 1
        messages = capsys.readouterr().err
        assert f"{server.url}/chat/completions cannot be reached" in messages
        assert "gave up after" in messages and "without an answer" in messages
        server.start()
        assert runs.make(run).exit_code == 0
    assert tables(run) == undisturbed


SCENES = {"kind": "scenes", "num_images": 24, "shard_size": 12, "broken_share": 0.1, "start": 7}


def scenes(judge: dict[str, Any], captioner: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a run over generated scenes, with the models that ship."""
    return {
        "source": SCENES,
        "engines.captioner": {"model": "scenes-captioner", "dtype": "float32", **captioner},
        "engines.judge": {"model": "scenes-judge", **judge},
        "caption.dense": {"recipe": "scenes", "engine": "captioner"},
        "score.judge": {"kind": "judge", "engine": "judge", "rubric": "scenes"},
    }


@pytest.fixture
def by_transformers(tmp_path: Path) -> Path:
    """The same run by transformers, at batch size 1."""
    alone = {"kind": "transformers", "batch_size": 1}
    run = runs.begin(tmp_path / "transformers", scenes({**alone, "dtype": "float32"}, alone), max_error_share=1.0)
    for stage in ("ingest", "caption", "score"):
        assert runs.make(run, stage).exit_code == 0
    return run


@pytest.mark.vllm
def test_vllm_captions_in_process_and_judges_as_a_server_and_both_are_killed_in_mid_shard(
    tmp_path: Path, by_transformers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = {"enforce_eager": True, "kv_cache_gib": 1}
    # Images are sent at the sizes at which the models themselves see them.
    served = {"kind": "openai", "base_url": "endpoint", "max_pixels": 10240, "factor": 16, "max_in_flight": 2}
    parts = scenes({**served, "serve": {"dtype": "float32", **eager}}, {"kind": "vllm", **eager})
    run = runs.begin(tmp_path / "run", parts, max_error_share=1.0)
    assert runs.make(run, "ingest").exit_code == 0
    runs.kill_after_first_rows(run, "caption")
    assert runs.make(run, "caption").exit_code == 0
    again = tmp_path / "again"
    shutil.copytree(run, again)
    num_answered = 0

    def kill_and_restart() -> None:
        nonlocal num_answered
        while (num_answered := first.num_answered()) < 8:
            time.sleep(0.02)
        first.kill()
        servers.append(stack.enter_context(start_server(run, "judge")))

    with ExitStack() as stack:
        first, servers = stack.enter_context(start_server(run, "judge")), list[ModelServer]()
        killer = threading.Thread(target=kill_and_restart)
        killer.start()
        assert runs.make(run, "score").exit_code == 0
        killer.join()
        assert servers[0].num_answered() > 8
        (again / "endpoints").mkdir()
        shutil.copy(servers[0].endpoint, again / "endpoints")
        assert runs.make(again, "score").exit_code == 0
        assert 8 <= num_answered < servers[0].num_answered() / 2, "the server was killed too late"
    assert runs.files(run / "score") == runs.files(again / "score")
    captions = measure_agreement(run, by_transformers, "caption/dense", "text")
    scores = measure_agreement(run, by_transformers, "score/judge", "round(value, 6)")
    with capsys.disabled():
        print(f" vLLM and transformers agree on {captions:.0%} of the captions, {scores:.0%} of the scores ")
    assert captions >= 0.95 and scores >= 0.9


def measure_agreement(run: Path, other: Path, table: str, column: str) -> float:
    """Returns the share of rows with the same value in two runs; every row is in both."""
    query = f"SELECT key, {column} FROM '{{}}/{table}/**/*.parquet' ORDER BY key, candidate"
    mine, others = (duckdb.sql(query.format(folder)).fetchall() for folder in (run, other))
    assert [key for key, _ in mine] == [key for key, _ in others] and len(mine) > 10
    return sum(one == two for one, two in zip(mine, others, strict=True)) / len(mine)
