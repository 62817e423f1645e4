"""Runs over servers in trouble end with the rows of an undisturbed run; those over real ones with all their rows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests import runs, tiny
from tests.faults import Faulty
from tests.served import serving

NUM_PHOTOS = 24


def begin(folder: Path, photos: Path, server: Faulty, **changes: Any) -> Path:
    engine = {"kind": "openai", "model": "echo", "base_url": server.url, "max_in_flight": 4, "timeout": 0.5, **changes}
    return runs.begin(folder, runs.sections(photos, engines__captioner=engine, engines__judge=engine))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return runs.corpus(tmp_path / "photos", ["jpg", "png", "webp"] * (NUM_PHOTOS // 3))


@pytest.fixture
def undisturbed(tmp_path: Path, photos: Path) -> dict[str, bytes]:
    with Faulty() as server:
        run = begin(tmp_path / "undisturbed", photos, server)
        assert runs.make(run).exit_code == 0
    return tables(run)


def tables(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in runs.files(run).items() if name.endswith((".parquet", ".tar"))}


def test_a_server_that_fails_at_a_tenth_of_all_requests(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes]
) -> None:
    with Faulty(share=0.1) as server:
        run = begin(tmp_path / "run", photos, server)
        assert runs.make(run).exit_code == 0
    assert server.seen.total() > server.seen[""]
    assert tables(run) == undisturbed


def test_a_server_that_is_killed_in_mid_shard_and_started_again(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes]
) -> None:
    with Faulty() as server:
        server.delay = 0.1
        run = begin(tmp_path / "run", photos, server)
        timers = [threading.Timer(0.3, server.stop), threading.Timer(1.5, server.start)]
        runs.make(run, "ingest")
        for timer in timers:
            timer.start()
        assert runs.make(run).exit_code == 0
        for timer in timers:
            timer.join()
    assert tables(run) == undisturbed


def test_a_server_that_stays_dead_ends_the_run_and_says_all(
    tmp_path: Path, photos: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with Faulty() as server:
        run = begin(tmp_path / "run", photos, server, give_up_after=1.0)
        server.delay = 0.1
        runs.make(run, "ingest")
        threading.Timer(0.3, server.stop).start()
        assert runs.make(run).exit_code == 1
        said = capsys.readouterr().err
        assert f"{server.url}/chat/completions cannot be reached" in said
        assert "gave up after" in said and "without an answer" in said
        server.start()
        assert runs.make(run).exit_code == 0
    assert tables(run) == undisturbed


@pytest.mark.vllm
def test_vllm_captions_in_process_and_judges_as_a_server(tmp_path: Path, tiny_model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(40):
        (photos / f"{n:03d}.png").write_bytes(tiny.photograph(n))
    (photos / "cut.png").write_bytes(tiny.photograph(40)[:100])
    flags = {"dtype": "float32", "max_num_seqs": 8, "enforce_eager": True}
    with serving(tiny_model, **flags) as server:
        captioner = {"kind": "vllm", "model": str(tiny_model), "kv_cache_gib": 1, **flags}
        judge = {"kind": "openai", "model": "tiny", "base_url": f"{server.address}/v1"}
        parts = runs.sections(photos, engines__captioner=captioner, engines__judge=judge)
        parts["caption.dense"]["recipe"] = "tiny"
        run = runs.begin(tmp_path / "run", parts, max_error_share=1.0)
        (run / "recipes").mkdir()
        words = (
            'prompt = "Describe it."\n[sampling]\ntemperature = 1.0\nmax_tokens = 64\nladder = [1.0, 1.0, 1.0, 1.0]\n'
        )
        (run / "recipes" / "tiny.toml").write_text(words)
        assert runs.make(run).exit_code == 0
    ((num_captions, num_ok, models),) = counted(run, "caption", "count(*) FILTER (status = 'ok'), list(DISTINCT model)")
    ((num_scores, num_tokens),) = counted(run, "score/judge", "sum(num_output_tokens)")
    assert (num_captions, models) == (40, [str(tiny_model)])
    assert 0 < num_ok == num_scores and num_tokens > 0


def counted(run: Path, table: str, columns: str) -> list[tuple[Any, ...]]:
    return duckdb.sql(f"SELECT count(*), {columns} FROM '{run}/{table}/**/*.parquet'").fetchall()
