"""Export form `llava`: `export/llava/data/00000.jsonl` with LLaVA's `conversations`, and the image files beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.payloads import LooseFile
from stages.exporters import CardEntry, ExportSample
from stages.exporters._conversations import Conversations, find_image, read_rows, remove_placeholders

CARD = CardEntry(image="image", caption="conversations", data_files="llava/data/*.jsonl")
REFERENCES_IMAGES = True


def open(run: Path, shard: int, work: Path, split: str = "") -> Conversations:
    return Conversations(run, shard, work, folder=f"llava/{split}", build_row=build_row)


def build_row(sample: ExportSample, question: str, path: str) -> dict[str, Any]:
    turns = [("human", question), ("gpt", remove_placeholders(sample.row.caption))]
    return {
        "id": sample.row.key,
        "image": path,
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "source_key": sample.row.source_key,
        "sha256": sample.row.sha256,
    }


def list_loose_files(path: Path) -> Iterator[LooseFile]:
    for row in read_rows(path):
        yield LooseFile(path=find_image(path, row["image"]), key=row["id"])
