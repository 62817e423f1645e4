"""Croissant metadata: mlcroissant finds no error in it, and reads every row of Parquet forms by it."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.records import Exported
from pipeline.storage import tables
from tests.support.runs import begin, corpus, make, recap, sections

FORMS = ["captions", "messages", "overlay", "parquet", "sidecar", "webdataset"]


def export(folder: Path, **settings: Any) -> Path:
    photos = corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 4)
    parts = sections(photos, filter={"rules": {}}, export={"formats": FORMS, "license": "cc-by-4.0", **settings})
    run = begin(folder / "run", {**parts, "source": {**parts["source"], "shard_size": 6}})
    assert make(run).exit_code == 0
    return run


def open_dataset(run: Path) -> Any:
    import mlcroissant

    dataset = mlcroissant.Dataset(jsonld=run / "export" / "croissant.json")
    assert not dataset.metadata.issues.errors
    return dataset


def read_rows(run: Path) -> dict[bytes, Exported]:
    paths = sorted((run / "export/index").glob("*.parquet"))
    return {row.key.encode(): row for path in paths for row in tables.read_rows(path, Exported)}


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, {"train": 0.5, "val": 0.5}])
def test_mlcroissant_reads_every_row(tmp_path: Path, split: dict[str, float] | None) -> None:
    run = export(tmp_path, **({"split": split} if split else {}))
    rows, dataset = read_rows(run), open_dataset(run)
    assert len(rows) == 12
    for form in ("parquet", "captions", "overlay"):
        records = list(dataset.records(f"{form}-samples"))
        assert {record[f"{form}-samples/key"] for record in records} == rows.keys()
        for record in records:
            row = rows[record[f"{form}-samples/key"]]
            assert record[f"{form}-samples/caption"].decode() == row.caption
            assert record[f"{form}-samples/sha256"].decode() == row.sha256
            assert record[f"{form}-samples/width"] == row.width
            if split:
                assert record[f"{form}-samples/split"].decode() in split
    for record in dataset.records("parquet-samples"):
        picture = record["parquet-samples/image"]
        size = (picture if isinstance(picture, Image.Image) else Image.open(BytesIO(picture))).size
        row = rows[record["parquet-samples/key"]]
        assert size == (row.width, row.height)


def test_it_has_the_licence_and_is_listed_with_its_digest(tmp_path: Path) -> None:
    run = export(tmp_path, formats=["captions"])
    text = json.loads((run / "export/croissant.json").read_text())
    assert text["license"] == "https://choosealicense.com/licenses/cc-by-4.0/"
    assert [one["includes"] for one in text["distribution"]] == ["captions/*.parquet"]
    assert "../croissant.json" in (run / "export/index/SHA256SUMS").read_text()
    (run / "export/croissant.json").write_text("{}")
    found = recap("verify", "--run", run, check=False)
    assert (found.returncode, "croissant.json" in found.stdout) == (1, True)
