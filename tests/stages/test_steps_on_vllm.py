"""A recipe with steps on real vLLM, in process and as a server, with the captioner that ships."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Caption
from tests.stages.test_steps import read, write_recipe
from tests.support.runs import ROOT, begin, make
from tests.support.served import serve_model

SHIPPED = ROOT / "stages" / "scenes" / "models" / "scenes-captioner"
TILES = """
text = "{whole} {tiles}"

[[steps]]
name = "whole"
prompt = "Describe the picture."

[[steps]]
name = "tiles"
prompt = "Describe the picture."
each = "2x2"
show = "crop"
sampling = { max_tokens = 64, ladder = [0.8, 0.8, 1.0, 1.0, 1.0] }

[sampling]
temperature = 0.0
max_tokens = 192
ladder = [0.5, 0.8, 1.0]
"""


@pytest.fixture(params=["vllm", "openai"])
def vllm_section(request: pytest.FixtureRequest, vllm_flags: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`[engines.captioner]` of the captioner that ships, in process or as a server."""
    if request.param == "vllm":
        yield {"kind": "vllm", "model": str(SHIPPED), **vllm_flags}
    else:
        with serve_model(SHIPPED, **vllm_flags) as server:
            yield {"kind": "openai", "model": "tiny", "base_url": f"{server.address}/v1", "max_in_flight": 8}


@pytest.mark.vllm
def test_a_chain_on_vllm(tmp_path: Path, vllm_section: dict[str, Any]) -> None:
    write_recipe(tmp_path, TILES)
    section = {"engine": "captioner"}
    parts = {
        "source": {"kind": "scenes", "num_images": 40, "broken_share": 0.0, "duplicate_share": 0.0},
        "engines.captioner": vllm_section,
        "caption.single": {"recipe": "scenes", **section},
        "caption.mine": {"recipe": "mine", **section},
    }
    run = begin(tmp_path, parts)
    make(run, "ingest")
    assert make(run, "caption").exit_code == 0
    rows, single = read(run), read(run, "caption/single", Caption)
    assert [row.key for row in rows] == [row.key for row in single] and len(rows) == 40
    assert sum(row.status == "ok" for row in rows) >= 36, [row.error for row in rows]
    sound = [row for row in rows if row.status == "ok"]
    assert all([step.name for step in row.steps] == ["whole", *["tiles"] * 4] for row in sound)
    assert all((row.num_output_tokens or 0) > 5 * 5 and row.text.startswith(row.steps[0].text) for row in sound)
    # The first step is the same question as that of the single pass; only the company in its batch differs.
    assert sum(row.steps[0].text == one.text for row, one in zip(rows, single, strict=True)) >= 36
    assert len({step.text for row in sound for step in row.steps[1:]}) > 2 * len(sound)
