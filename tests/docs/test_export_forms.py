"""The loading lines of docs/export-forms.md, each run by its real loader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stages.exporters import mds
from tests.support.pages import Block, list_blocks
from tests.support.runs import ROOT, begin, corpus, make, recap, sections

PAGE = (ROOT / "docs" / "export-forms.md",)
FORMS = ("captions", "lance", "mds", "messages", "overlay", "parquet", "sidecar", "webdataset")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs/photos, exported in all forms."""
    folder = tmp_path_factory.mktemp("forms")
    parts = sections(corpus(folder / "photos", ["jpg", "png"] * 3), filter={"rules": {}}, export={"formats": FORMS})
    assert make(begin(folder / "runs" / "photos", parts)).exit_code == 0
    return folder


@pytest.mark.parametrize("block", list_blocks("python", pages=PAGE), ids=lambda block: block.id)
def test_loading_lines_load(block: Block, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block.text, block.page.name, "exec"), names)
    if "trl's" in block.text:
        check_messages(names["dataset"])
    found = [names[name] for name in ("image", "sample", "dataset") if name in names]
    assert found or "captions/*.parquet" in block.text


def test_images_of_mds_are_read_as_its_library_reads_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming import StreamingDataset

    run = home / "runs" / "photos"
    dataset = StreamingDataset(local=str(run / "export" / "mds"), batch_size=1)
    expected = [(row["key"], row["image"]) for row in dataset]
    assert len(expected) == 6
    for name in [name for name in sys.modules if name.partition(".")[0] == "streaming"]:
        monkeypatch.setitem(sys.modules, name, None)
    found = [pair for path in sorted((run / "export" / "mds").rglob("*.mds")) for pair in mds.read_images(path)]
    assert found == expected
    assert recap("verify", "--run", run).stdout == ""


def check_messages(dataset: Any) -> None:
    """TRL finds one image for each user's turn, and no placeholder that it would take for text."""
    from trl.data_utils import prepare_multimodal_messages

    for row in dataset:
        question, answer = prepare_multimodal_messages(row["messages"], images=row["images"])
        assert [part["type"] for part in question["content"]] == ["image", "text"]
        assert question["content"][1]["text"] == "Describe this image in detail."
        assert answer["content"][0]["text"]
