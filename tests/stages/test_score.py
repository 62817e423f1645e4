"""The score stage: one score for each usable caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines import echo
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Caption, Image, Piece
from pipeline.storage import plan, tables
from pipeline.storage.layout import table_path
from stages import score
from tests.support.scoring import (
    PROVENANCE,
    SENTENCE_RUBRIC,
    caption_row,
    image_row,
    load_rubric,
    parse_score_run,
)


def list_score_passes(folder: Path, **section: Any) -> list[Pass]:
    return list(score.passes(parse_score_run(folder, score={"mine": section})))


corpora = st.lists(
    st.tuples(st.booleans(), st.lists(st.sampled_from(["ok", "ok", "empty", "repeated", "error"]), max_size=3)),
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=20)
@given(corpora, st.sampled_from(["text", "judge"]))
def test_every_usable_caption_has_one_score(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[tuple[bool, list[str]]], kind: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    images = [image_row(i, "ok" if usable else "empty") for i, (usable, _) in enumerate(corpus)]
    captions = [
        caption_row(i, n, status)
        for i, (usable, statuses) in enumerate(corpus)
        for n, status in enumerate(statuses)
        if usable
    ]
    plan.write_plan(folder / "plan.parquet", [Piece(file="f", start=0, stop=max(1, len(images)))], shard_size=100)
    tables.write_rows(table_path(folder, "image", 0), Image, images, PROVENANCE)
    tables.write_rows(table_path(folder, "caption/dense", 0), Caption, captions, PROVENANCE)
    (folder / "shards").mkdir()
    (folder / "shards" / "00000.tar").write_bytes(b"12345678")
    frozen, _ = plan.Plan.load(folder / "plan.parquet")
    engine = {"engine": "model"} if kind == "judge" else {}
    (p,) = list_score_passes(folder, kind=kind, captions=["dense"], **engine)
    shard = Shard(run=parse_score_run(folder), number=0, pieces=frozen.pieces(0))
    rows = list(p.work(p.inputs(shard), {"model": echo.open(echo.Config(invalid_share=0.3, error_share=0.1))}))
    shard.close()
    assert [row.id for row in rows] == [row.id for row in captions if row.status == "ok"]
    assert all((row.value is None) == (row.status != "ok") for row in rows)
    assert all(0 <= row.value <= 1 for row in rows if row.value is not None)


def test_each_caption_pass_has_a_score_pass_that_reads_only_it(tmp_path: Path) -> None:
    passes = list_score_passes(tmp_path, kind="judge", engine="model")
    assert [(p.title, p.folder, p.reads, p.engines) for p in passes] == [
        ("score:mine:dense", "score/mine/dense", ("image", "caption/dense"), ("model",)),
        ("score:mine:short", "score/mine/short", ("image", "caption/short"), ("model",)),
    ]
    assert json.loads(json.dumps(passes[0].slice)) == passes[0].slice
    assert [p.caption for p in list_score_passes(tmp_path, kind="text", captions=["short"])] == ["short"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "judge", "engine": "modle"}, "score.mine.engine: 'modle' is none of model"),
        ({"kind": "judge", "engine": "model", "rubric": "dens"}, "score.mine.rubric: 'dens' is none of .*dense"),
        ({"kind": "juge"}, "score.mine.kind: 'juge' is none of .*judge, .*rubric, .*text.*; did you mean 'judge'"),
        ({"kind": "rubric", "rubric": "mine"}, r"score.mine.rubric: 'mine' is none of \(there are none\)"),
        ({"kind": "text", "captions": ["dens"]}, "score.mine.captions: 'dens' is none of dense, short"),
        ({"kind": "text", "min_word": 3}, "score.mine.min_word: unknown key; did you mean 'min_words'"),
        ({"kind": "text", "flags": "latin"}, "score.mine.flags: 'latin' is none of .*english"),
        ({"kind": "text", "weights": {"lop": 1}}, "score.mine.weights.lop: 'lop' is none of"),
        ({"kind": "text", "min_words": 9, "max_words": 8}, "score.mine: min_words = 9 is more than"),
    ],
)
def test_errors_name_the_section_and_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_score_passes(tmp_path, **section)


def test_changing_a_rubric_changes_the_fingerprint(tmp_path: Path) -> None:
    load_rubric(tmp_path, SENTENCE_RUBRIC)
    (before, _) = list_score_passes(tmp_path, kind="judge", engine="model", rubric="mine")
    load_rubric(tmp_path, SENTENCE_RUBRIC.replace("Is it true?", "Is it really true?"))
    (after, _) = list_score_passes(tmp_path, kind="judge", engine="model", rubric="mine")
    assert before.slice != after.slice
    assert after.slice["rubric"]["criteria"]["true"]["question"] == "Is it really true?"
