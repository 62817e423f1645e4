"""What is asked about an image, what an answer is accepted for, and that every candidate leaves a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, plan, tables
from pipeline.engines import echo
from pipeline.errors import ConfigError
from pipeline.passes import Pass
from pipeline.records import Caption, Image, Piece, Score, make_key
from pipeline.shard import Shard, table_path
from stages import caption

RECIPE = tables.Recipe(stage="", name="", version=1, slice={}, inputs={})


def image(index: int, **changes: Any) -> Image:
    about: dict[str, Any] = {
        "key": make_key(0, index),
        "shard": 0,
        "index": index,
        "status": "ok",
        "error": None,
        "source": "test",
        "source_key": f"test/{index}",
        "file": "shards/00000.tar",
        "offset": 8 * index,
        "num_bytes": 8,
        "format": "jpeg",
        "width": 100 + index,
        "height": 100,
        "orientation": 1,
        "num_frames": 1,
        "sha256": "0" * 64,
        "alt_text": None,
        "metadata": "{}",
    }
    return Image(**about | changes)


def run_of(folder: Path, **sections: Any) -> config.Run:
    values = {"source": {"kind": "scenes"}, "engines": {"model": {"kind": "echo"}}} | sections
    return config.parse(values, file=folder / "run.toml")


def pass_of(folder: Path, section: dict[str, Any] | None = None, **sections: Any) -> Pass:
    captions = {"dense": {"engine": "model"} | (section or {})}
    (found,) = (p for p in caption.passes(run_of(folder, caption=captions, **sections)) if p.name == "dense")
    return found


@contextmanager
def shard_of(folder: Path, images: list[Image]) -> Iterator[Shard]:
    """A run with one shard, whose image n is the eight bytes of its number."""
    plan.freeze(folder / "plan.parquet", [Piece(file="f", start=0, stop=len(images) or 1)], shard_size=10_000)
    tables.write(table_path(folder, "image", 0), Image, images, RECIPE)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "00000.tar").write_bytes(b"".join(f"{i:08d}".encode() for i in range(len(images))))
    frozen, _ = plan.Plan.load(folder / "plan.parquet")
    shard = Shard(run=run_of(folder), plan=frozen, number=0)
    yield shard
    shard.close()


def rows_of(p: Pass, shard: Shard, **shares: Any) -> list[Caption]:
    return list(p.work(p.inputs(shard), {"model": echo.open(echo.Config(**shares))}))


statuses = st.sampled_from(["ok", "ok", "ok", "empty", "unreadable", "unsupported", "too_small", "too_large"])


@settings(max_examples=25, deadline=None)
@given(st.lists(statuses, max_size=12), st.integers(1, 4), st.floats(0, 0.2), st.floats(0, 0.2))
def test_every_usable_image_leaves_num_candidates_rows(
    tmp_path_factory: pytest.TempPathFactory, found: list[Any], num_candidates: int, errors: float, empty: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    images = [image(i, status=status) for i, status in enumerate(found)]
    with shard_of(folder, images) as shard:
        p = pass_of(folder, {"num_candidates": num_candidates, "ladder": []})
        rows = rows_of(p, shard, error_share=errors, empty_share=empty, truncated_share=0.2, repeated_share=0.2)
    usable = [one.key for one in images if one.status == "ok"]
    assert [row.id for row in rows] == [(key, n) for key in usable for n in range(num_candidates)]
    assert all((row.status == "ok") == (row.error is None) for row in rows)


def test_a_row_says_how_it_came(tmp_path: Path) -> None:
    with shard_of(tmp_path, [image(0)]) as shard:
        (row,) = rows_of(pass_of(tmp_path), shard)
    assert (row.status, row.attempt, row.model, row.engine, row.finish_reason) == ("ok", 1, "echo", "model", "stop")
    assert json.loads(row.sampling) == {
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_tokens": 512,
    }
    assert row.num_output_tokens == len(row.text.split()) and len(row.prompt_hash) == 16 and row.flags == ()


def score(index: int, candidate: int, value: float | None, **changes: Any) -> Score:
    about: dict[str, Any] = {"caption": "short", "name": "judge", "criteria": (), "error": None}
    status = "unknown" if value is None else "ok"
    return Score(
        **about | {"key": make_key(0, index), "candidate": candidate, "value": value, "status": status} | changes
    )


def keys_where(folder: Path, where: str, *, of: str | None = None) -> list[int]:
    section = {"where": where} | ({} if of is None else {"of": of})
    captions = {"dense": {"engine": "model"} | section, "short": {"engine": "model"}}
    judge = {"judge": {"kind": "text"}} if of else {}
    (p,) = (p for p in caption.passes(run_of(folder, caption=captions, score=judge)) if p.name == "dense")
    images = [image(i, status="empty" if i == 4 else "ok", alt_text="a cat" if i == 5 else None) for i in range(6)]
    with shard_of(folder, images) as shard:
        return [int(wanted.image.key) for wanted in p.inputs(shard)]


def test_where_chooses_by_image_columns(tmp_path: Path) -> None:
    assert keys_where(tmp_path, "width > 101 AND alt_text IS NULL") == [2, 3]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"engine": "modell"}, "caption.dense.engine: 'modell' is none of model; did you mean 'model'"),
        ({"recipe": "dens"}, "caption.dense.recipe: 'dens' is none of .*did you mean 'dense'"),
        ({"where": "width >"}, "caption.dense.where: .*syntax"),
        ({"where": "widht > 3"}, "caption.dense.where: .*mentions widht"),
        ({"where": "width LIKE 3 + '{}'::BLOB"}, "caption.dense.where"),
        ({"where": "finish_reason = 'stop'"}, "caption.dense.where: .*finish_reason"),
        ({"of": "dens"}, "caption.dense.of"),
        ({"num_candidates": 0}, "caption.dense.num_candidates: 0 is too small; the least is 1"),
        ({"num_candidates": 2, "temperature": 0}, "caption.dense.num_candidates: 2 candidates would be equal"),
        ({"top_p": 0}, "caption.dense: top_p"),
    ],
)
def test_what_is_wrong_in_a_section_is_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pass_of(tmp_path, section)
