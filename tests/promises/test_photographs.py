"""Real photographs in many formats through the whole pipeline, with a real (untrained) vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.records import Caption, Image, Record
from pipeline.storage import tables
from tests.support import corpora
from tests.support.runs import begin, kill_after_first_rows, make, recap_alone, sections

MODEL = {"kind": "transformers", "dtype": "float32", "max_pixels": 112 * 112, "batch_size": 8}


def read_rows(run: Path, folder: str, record: type[Record]) -> list[Record]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


def make_sections(photos: Path, model: Path) -> dict[str, dict[str, object]]:
    """Captions of an untrained model rarely end by themselves, so the only rule is their length."""
    return sections(
        photos,
        source={"shard_size": 20, "max_error_share": 1.0},
        engines__captioner={**MODEL, "model": str(model)},
        caption__dense={"recipe": "plain", "temperature": 0.0, "max_tokens": 12, "ladder": []},
        filter={"rules": {"short": "len(text) < 2000"}, "choose": "candidate"},
    )


@pytest.mark.slow
def test_every_photograph_has_one_row_with_the_right_status(tmp_path: Path, tiny_model: Path) -> None:
    expected = corpora.write_photographs(tmp_path / "photos")
    run = begin(tmp_path / "run", make_sections(tmp_path / "photos", tiny_model), max_error_share=1.0)
    done = recap_alone("run", "all", "--run", run, check=False)
    assert done.returncode == 0, done.stderr
    images = read_rows(run, "image", Image)
    assert {image.source_key: image.status for image in images} == expected
    assert len(images) == len(expected) > 60
    captions = read_rows(run, "caption/dense", Caption)
    assert [row.key for row in captions] == [image.key for image in images if image.status == "ok"]
    assert {row.model for row in captions} == {str(tiny_model)}
    assert sum(row.num_output_tokens or 0 for row in captions) > len(captions)
    assert "error" not in {row.status for row in captions}
    stats = json.loads((run / "export" / "stats.json").read_text())
    assert stats["num_samples"] == sum(row.status == "ok" for row in captions)


@pytest.mark.slow
def test_a_kill_loses_no_row_of_a_real_model(tmp_path: Path, tiny_model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, data in enumerate(list(corpora.load_photographs().values())[:12] * 3):
        (photos / f"{number:03d}.jpg").write_bytes(data)
    undisturbed = begin(tmp_path / "whole", make_sections(photos, tiny_model), max_error_share=1.0)
    make(undisturbed, "ingest")
    make(undisturbed, "caption")
    killed = begin(tmp_path / "killed", make_sections(photos, tiny_model), max_error_share=1.0)
    make(killed, "ingest")
    kill_after_first_rows(killed, "caption")
    make(killed, "caption")
    texts = [{row.key: row.text for row in read_rows(run, "caption/dense", Caption)} for run in (undisturbed, killed)]
    assert len(read_rows(killed, "caption/dense", Caption)) == len(texts[1])
    assert texts[0].keys() == texts[1].keys()
    same = sum(texts[0][key] == texts[1][key] for key in texts[0])
    assert same >= 0.99 * len(texts[0])
