"""Reports of what takes long."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from pipeline import progress
from pipeline.progress import Patience, ProgressMeter, report_waiting


def test_a_wait_is_reported_ever_more_rarely() -> None:
    patience = Patience()
    reported = [second for second in range(600) if patience.is_due(second)]
    assert reported[0] <= 10
    gaps = [b - a for a, b in pairwise(reported)]
    assert gaps == sorted(gaps) and len(reported) < 10


def test_a_slow_block_is_reported_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT", 0.01)
    reported, messages = threading.Event(), list[str]()

    def record(message: str) -> None:
        messages.append(message)
        reported.set()

    monkeypatch.setattr(progress, "say", record)
    with report_waiting("loading captioner"):
        assert reported.wait(30)
    assert messages[0].startswith("recap: loading captioner: ")


def test_only_the_longest_stalls_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = ProgressMeter("caption:dense", num_shards=1, num_rows=9)
    for stall in (10, 12, 30, 25):
        now[0] += stall
        meter.report_stall()
        meter.add(1, 0)
    reported = [line for line in capsys.readouterr().err.splitlines() if "no new row" in line]
    assert reported == [f"recap: caption:dense: no new row for {stall} s" for stall in (10, 30)]
