"""Texts of training sets: drawn by weight, all kept ones, alt texts of the top share, cut to tokens, and weighted."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.records import Exported
from pipeline.storage import tables
from tests.support.runs import begin, corpus, files, make, recap, sections, write

pytestmark = pytest.mark.slow
SOME = "CASE WHEN key < '000000000002' THEN 1 END"  # a weight that most samples lack


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes with two candidates each; every third image has an alt text, with its number."""
    folder = tmp_path_factory.mktemp("texts")
    run = begin(folder / "run", two_passes(corpus(folder / "photos", ["jpg"] * 30)))
    assert make(run).exit_code == 0
    return run


def two_passes(photos: Path, **export: Any) -> dict[str, Any]:
    passes = {
        f"caption__{name}": {"recipe": name, "engine": "captioner", "num_candidates": 2} for name in ("dense", "short")
    }
    rules = {"some": "hash(key || name || candidate) % 5 > 0"}
    return sections(photos, **passes, filter={"rules": rules}, export={"formats": ["parquet"], **export})


def export(run: Path, seed: int = 0, **keys: Any) -> list[Exported]:
    """The rows of the run's training set with these keys of `[export]`."""
    write(run, two_passes(run.parent / "photos", **keys), seed=seed)
    assert make(run, "export", stale="redo").exit_code == 0
    return [row for path in sorted((run / "export" / "index").glob("*")) for row in read_table(path)]


def read_table(path: Path) -> list[Exported]:
    return list(tables.read_rows(path, Exported)) if path.suffix == ".parquet" else []


def test_texts_are_drawn_by_weight_and_the_same_seed_gives_the_same_bytes(captioned: Path) -> None:
    keys = {"texts": {"dense": 0.4, "short": 0.3, "raw": 0.3}, "drop": 0.2, "sentences": 1, "prefix": {"raw": "Alt: "}}
    rows, written = export(captioned, **keys), files(captioned / "export" / "parquet")
    assert {row.caption_pass for row in rows} == {"dense", "short", "raw"}
    assert "" in {row.caption for row in rows}
    kept = {(row["key"], row["name"]) for row in query(captioned, KEPT)}
    for row in rows:
        if row.caption_pass == "raw":
            assert row.caption in ("", f"Alt: {row.alt_text}") and (row.model, row.scores) == ("", ())
        else:
            assert (row.key, row.caption_pass) in kept
    assert {key for key, _ in kept} == {row.key for row in rows}
    export(captioned, seed=1, **keys)
    assert files(captioned / "export" / "parquet") != written
    export(captioned, **keys)
    assert files(captioned / "export" / "parquet") == written


KEPT = """SELECT key, name, text, candidate FROM verdict JOIN caption USING (key, candidate)
    WHERE verdict.caption = caption.name AND keep ORDER BY key, name, candidate"""


WEIGHTS = """SELECT c.key, c.name, c.candidate, value + len(regexp_extract_all(text, '\\S+')) AS weight
    FROM caption AS c JOIN score AS s ON s.key = c.key AND s.caption = c.name AND s.candidate = c.candidate
    WHERE s.name = 'judge'"""


def query(run: Path, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(recap("sql", sql, "--run", run, "--format", "json").stdout)
    return found


def test_all_kept_captions_travel(captioned: Path) -> None:
    import pyarrow.parquet as pq

    rows, chosen = export(captioned, texts="all"), {row.key: row.caption for row in export(captioned)}
    assert {row.key: row.caption for row in rows} == chosen
    texts = [(row.key, text.caption_pass, text.candidate, text.text) for row in rows for text in row.texts]
    assert sorted(texts) == [(row["key"], row["name"], row["candidate"], row["text"]) for row in query(captioned, KEPT)]
    ranked = [[text for text in row.texts if text.caption_pass == name] for row in rows for name in ("dense", "short")]
    assert all(texts == sorted(texts, key=lambda text: -text.score) for texts in ranked)
    export(captioned, texts="all")
    stored = pq.read_table(captioned / "export" / "parquet" / "00000.parquet")
    assert [len(texts) for texts in stored["texts"].to_pylist()] == [len(row.texts) for row in rows[: len(stored)]]


def test_alt_texts_of_the_top_share_of_the_whole_run_replace_captions(captioned: Path) -> None:
    number = "regexp_extract(alt_text, '\\d+')::INTEGER"  # 0, 3, ..., 27
    rows = export(captioned, raw_top=0.4, raw_score=number)
    replaced = {row.source_key: row.caption for row in rows if row.caption_pass == "raw"}
    assert replaced == {f"{i:05d}.jpg": f"alt text of number {i}" for i in (18, 21, 24, 27)}
    assert {row.caption_pass for row in rows if row.source_key not in replaced} <= {"dense", "short"}
    assert recap("verify", "--run", captioned).stdout == ""


def test_one_outlier_leaves_the_share_of_alt_texts_as_it_is(captioned: Path) -> None:
    """Scores in bins of equal width were all in one."""
    number = "regexp_extract(alt_text, '\\d+')::INTEGER"
    rows = export(captioned, raw_top=0.4, raw_score=f"CASE WHEN {number} = 27 THEN 1e12 ELSE {number} END")
    assert sum(row.caption_pass == "raw" for row in rows) == 4


def test_captions_are_cut_to_the_tokens_of_a_model_and_samples_have_weights(captioned: Path) -> None:
    rows = export(captioned, texts="all", tokenizer="scenes-captioner", max_tokens=12, weight="judge + num_words")
    assert max(row.num_tokens for row in rows) <= 12 < max(row.num_tokens + row.cut for row in rows)
    assert all(text.num_tokens <= 12 for row in rows for text in row.texts)
    weights = {(row["key"], row["name"], row["candidate"]): row["weight"] for row in query(captioned, WEIGHTS)}
    assert [row.weight for row in rows] == [weights[row.key, row.caption_pass, row.candidate] for row in rows]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"texts": {"tall": 1.0}}, "'tall'; it may name dense, raw, short"),
        ({"weight": "no_such"}, "export.weight"),
        ({"weight": "NULL"}, "export.weight"),
        ({"tokenizer": "no/such"}, "export.tokenizer"),
    ],
)
def test_keys_that_cannot_be_used_are_named(
    captioned: Path, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        export(captioned, **keys)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_weight_that_a_text_lacks_ends_the_export_in_one_line(captioned: Path) -> None:
    """Writers of Parquet wrote to closed files when they went, each with a traceback."""
    with pytest.raises(ConfigError, match=r"export\.weight"):
        export(captioned, texts={"dense": 1.0, "raw": 1.0}, weight=SOME, formats=["captions"])
    gc.collect()
