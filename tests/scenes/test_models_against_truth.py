"""A run without the scenes' truth captions, scores and keeps the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Caption, Image, Score, Verdict
from pipeline.sources import scenes
from pipeline.storage import tables
from tests.support.runs import begin, make

NUM_IMAGES = 6


def sections(source: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "source": source,
        "engines.captioner": {"kind": "transformers", "model": "scenes-captioner"},
        "engines.judge": {"kind": "transformers", "model": "scenes-judge"},
        "caption.main": {"recipe": "scenes", "engine": "captioner"},
        "score.judge": {"kind": "judge", "engine": "judge", "rubric": "scenes"},
        "filter": {"rules": {"believed": "judge >= 0.5"}},
    }


def run_stages(folder: Path, source: dict[str, Any]) -> list[list[tuple[Any, ...]]]:
    """Captions, scores and verdicts of a run."""
    begin(folder, sections(source))
    for stage in ("ingest", "caption", "score", "filter"):
        assert make(folder, stage).exit_code == 0
    captions = tables.read_rows(folder / "caption/main/00000.parquet", Caption)
    scores = tables.read_rows(folder / "score/judge/main/00000.parquet", Score)
    verdicts = tables.read_rows(folder / "verdict/00000.parquet", Verdict)
    return [
        [(row.key, row.text, row.status) for row in captions],
        [(row.key, row.value, row.criteria) for row in scores],
        [(row.key, row.keep, row.reason) for row in verdicts],
    ]


@pytest.mark.slow
def test_no_stage_reads_the_truth(tmp_path: Path) -> None:
    config = scenes.Config(num_images=NUM_IMAGES, seed=3, broken_share=0.0, duplicate_share=0.0)
    plain = tmp_path / "pictures"
    plain.mkdir()
    for index in range(NUM_IMAGES):
        raw = scenes.draw_sample(index, config)
        (plain / f"{index:03d}.jpg").write_bytes(raw.data or b"")
        if raw.alt_text is not None:
            (plain / f"{index:03d}.txt").write_text(raw.alt_text)
    known = {"kind": "scenes", "num_images": NUM_IMAGES, "seed": 3, "broken_share": 0.0, "duplicate_share": 0.0}
    with_truth = run_stages(tmp_path / "known", known)
    assert run_stages(tmp_path / "unknown", {"kind": "folder", "path": str(plain)}) == with_truth
    rows = list(tables.read_rows(tmp_path / "unknown/image/00000.parquet", Image))
    assert [row.metadata for row in rows] == ["{}"] * NUM_IMAGES
    assert all(text for _, text, _ in with_truth[0])
