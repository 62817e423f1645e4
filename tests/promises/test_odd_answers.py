"""Odd answers of a server are failures of their own rows; the other rows of the shard are as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Caption, Criterion, Score, make_storable
from pipeline.storage import tables
from tests.support import runs
from tests.support.answer_fuzzer import MAX_BYTES, fuzz
from tests.support.scripted import SOUND, Scripted, complete

NUM_IMAGES = 10
ODD = {
    "a lone surrogate": (complete(SOUND + " \ud83d"), "invalid"),
    "text in parts": (complete([{"type": "text", "text": SOUND}]), "ok"),
    "a number": (complete(7), "error"),
    "an odd reason to stop": (complete(SOUND, ["stop"]), "error"),
    "odd counts": (complete(SOUND) | {"usage": {"prompt_tokens": -1, "completion_tokens": 2**70}}, "ok"),
    "a refusal": (complete(None, refusal="no \ud83d"), "error"),
    "a rejection": ({"error": {"message": "no \ud83d"}}, "error"),
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_one_odd_answer_is_one_row(odd: str, tmp_path: Path) -> None:
    body, status = ODD[odd]
    with Scripted(lambda *_: body if server.seen[""] == 4 else complete(SOUND)) as server:
        engine = {"kind": "openai", "model": "m", "base_url": server.url, "max_in_flight": 1, "num_tries": 1}
        parts = runs.sections(runs.corpus(tmp_path / "photos", ["jpg"] * NUM_IMAGES))
        parts["engines.captioner"] = engine
        run = runs.begin(
            tmp_path / "run", {**parts, "caption.dense": {"recipe": "plain", "engine": "captioner", "ladder": []}}
        )
        runs.make(run, "ingest")
        assert runs.make(run, "caption").exit_code == 0
    rows = list(tables.read_rows(run / "caption" / "dense" / "00000.parquet", Caption))
    assert sorted(row.status for row in rows) == sorted([status] + ["ok"] * (NUM_IMAGES - 1))
    assert {row.text for row in rows if row.status == "ok"} == {SOUND}


@pytest.mark.slow
def test_a_lone_surrogate_in_a_judges_reason_is_retried(tmp_path: Path) -> None:
    def judge(_: Any, body: dict[str, Any]) -> dict[str, Any]:
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        verdicts = {
            name: {"reason": "It is so.", "verdict": part["properties"]["verdict"]["enum"][-2]}
            for name, part in schema.items()
        }
        text = json.dumps(verdicts)
        return complete(text.replace("It is so.", "It is \\ud83d") if server.seen[""] == 4 else text)

    with Scripted(judge) as server:
        parts = runs.sections(runs.corpus(tmp_path / "photos", ["jpg"] * NUM_IMAGES))
        parts["engines.judge"] = {"kind": "openai", "model": "m", "base_url": server.url, "max_in_flight": 1}
        run = runs.begin(tmp_path / "run", parts)
        assert runs.make(run).exit_code == 0
    rows = list(tables.read_rows(run / "score" / "judge" / "dense" / "00000.parquet", Score))
    assert sorted((row.status, row.attempt) for row in rows) == [("ok", 1)] * (NUM_IMAGES - 1) + [("ok", 2)]


def test_a_row_that_a_table_cannot_hold_is_a_failure_of_its_own() -> None:
    sound = Score(
        key="000000000000", caption="c", candidate=0, name="n", value=0.5, criteria=(), status="ok", error=None
    )
    criteria = (Criterion(id="a", verdict="yes", value=1.0, weight=1.0, reason="half \ud83d"),)
    odd = vars(sound) | {"criteria": criteria, "num_output_tokens": 2**63}
    row = make_storable(Score(**odd))
    assert (row.status, row.value, row.error) == (
        "error",
        None,
        "a table cannot hold its criteria and num_output_tokens",
    )
    assert len(tables.to_arrow(Score, [row, sound])) == 2 and make_storable(sound) is sound


@pytest.mark.slow
def test_mutated_answers_are_rows_and_show_no_key(tmp_path: Path) -> None:
    fuzzed = fuzz(tmp_path, num_mutations=200, seed=1)
    for stage, statuses in (("caption", ("ok", "error", "invalid")), ("score", ("ok", "error"))):
        found = fuzzed[stage]
        assert found.statuses.total() == 200 and all(found.statuses[status] for status in statuses)
        assert found.peak_bytes - found.baseline_bytes < MAX_BYTES // 2
