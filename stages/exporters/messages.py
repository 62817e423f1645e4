"""Export form `messages`: `export/messages/data/00000.jsonl` with `messages` and `images`, and the image files beside.

ms-swift, LLaMA-Factory and TRL read it. `dataset_info.json` describes it to LLaMA-Factory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.payloads import LooseFile
from stages.exporters import CardEntry, ExportSample, FormFile, put_text
from stages.exporters._conversations import Conversations, find_image, read_rows, remove_placeholders

CARD = CardEntry(image="images", caption="messages", data_files="messages/data/*.jsonl")
REFERENCES_IMAGES = True
INDEXES = ("dataset_info.json",)
DATASET = {
    "file_name": "data",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def open(run: Path, shard: int, work: Path, split: str = "") -> Conversations:
    return Conversations(run, shard, work, folder=f"messages/{split}", build_row=build_row)


def build_row(sample: ExportSample, question: str, path: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", remove_placeholders(sample.row.caption))]
    return {
        "messages": [{"role": role, "content": text} for role, text in turns],
        "images": [path],
        "key": sample.row.key,
        "source_key": sample.row.source_key,
        "sha256": sample.row.sha256,
    }


def write_index(folder: Path, files: Sequence[FormFile]) -> None:
    put_text(folder / "dataset_info.json", json.dumps({"recap": DATASET}, indent=2) + "\n")


def list_loose_files(path: Path) -> Iterator[LooseFile]:
    for row in read_rows(path):
        yield LooseFile(path=find_image(path, row["images"][0]), key=row["key"])
