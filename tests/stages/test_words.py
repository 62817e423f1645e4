"""Captions that no model wrote: `words` of a caption pass, beside those of models in every later stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass
from pipeline.records import Caption, Exported, Record, Score, Verdict
from pipeline.storage import tables
from stages import caption
from tests.stages.test_caption import build_pass, make_image, parse_run, run_pass, write_shard
from tests.support.runs import begin, corpus, make, recap, sections, write

RAW = {"words": "alt_text"}


def read(run: Path, folder: str, record: type[Record]) -> list[Any]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


def build_raw(folder: Path, **section: Any) -> Pass:
    (p,) = caption.passes(parse_run(folder, caption={"raw": section}))
    return p


def test_candidate_n_has_the_nth_text_of_a_list(tmp_path: Path) -> None:
    people = [["a cat ", "A tabby."], [], ["a dog", " ", "Dog!", "4"]]
    images = [make_image(i, metadata=json.dumps({"people": texts})) for i, texts in enumerate(people)]
    with write_shard(tmp_path, images) as shard:
        rows = run_pass(build_raw(tmp_path, words="metadata->>'$.people[*]'", num_candidates=3), shard)
    assert [row.id for row in rows] == [(image.key, n) for image in images for n in range(3)]
    assert [row.text for row in rows] == ["a cat", "A tabby.", "", "", "", "", "a dog", "Dog!", "4"]
    assert [row.status == "ok" for row in rows] == [bool(row.text) for row in rows]
    assert rows[2].error == "the SQL of words gives 2 texts for this image"
    assert {(row.model, row.engine, row.num_output_tokens, row.attempt) for row in rows} == {("", "", None, 0)}


def test_a_select_may_say_what_else_there_is_to_know(tmp_path: Path) -> None:
    """The rows of an image stay in order, those without a text too."""
    sql = "SELECT key, x.text, {n: x.n} AS fields FROM (SELECT key, unnest([{n: 1, text: 'a'}, {n: 2, text: ' '},"
    sql += " {n: 3, text: NULL}, {n: 4, text: ' b '}]) AS x FROM image WHERE index = 1)"
    with write_shard(tmp_path, [make_image(i) for i in range(2)]) as shard:
        rows = run_pass(build_raw(tmp_path, words=sql, num_candidates=4), shard)
    found = [(row.text, row.status, row.fields) for row in rows]
    assert found[:4] == [("", "empty", None)] * 4
    assert [(text, status) for text, status, _ in found[4:]] == [("a", "ok"), ("", "empty"), ("", "empty"), ("b", "ok")]
    assert rows[5].error == "the SQL of words gives an empty text"
    assert [json.loads(fields or "null") for _, _, fields in found[4:]] == [{"n": n} for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"words": "SELECT key, ['a'] AS text, 1 AS fields FROM image"}, "gives lists of texts, which have no fields"),
        ({"words": "SELECT key, 'a' AS text, 1 AS other FROM image"}, "one more, the text, and may have fields"),
        ({"words": "alt_text", "recipe": "dense"}, "caption.raw.recipe: is for a model, and .* asks none"),
        ({"words": "alt_text", "engine": "model"}, "caption.raw.engine: is for a model"),
        ({"words": "alt_text", "ladder": [0.5]}, "caption.raw.ladder: is for a model"),
        ({"words": "alt"}, "caption.raw.words: 'alt' uses alt; the columns are alt_text"),
        ({"words": "SELECT key, text FROM raw"}, "caption.raw.words: .* the pass itself"),
        ({"recipe": "dense"}, "caption.raw.engine: is missing; it is a string: the captioner"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_raw(tmp_path, **section)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which every third has an alt text, and a copy of one with another alt text."""
    folder = corpus(tmp_path_factory.mktemp("words") / "photos", ["jpg", "png", "cut", "jpg", "webp", "jpg"])
    shutil.copy(folder / "00000.jpg", folder / "00009.jpg")
    (folder / "00009.txt").write_text("the copy")
    return folder


def configure(photos: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    best = {"words": "SELECT key, text FROM dense WHERE judge >= 0 ORDER BY judge DESC"}
    more = {"caption__raw": RAW, "caption__best": best, "filter": {"rules": {}, "choose": "caption = 'raw' DESC"}}
    return sections(photos, **{**more, **changes})


@pytest.mark.slow
def test_raw_and_synthetic_captions_are_scored_filtered_and_mixed_alike(tmp_path: Path, photos: Path) -> None:
    run = begin(tmp_path / "run", configure(photos, export={"texts": {"raw": 20.0, "dense": 1.0}}))
    assert make(run).exit_code == 0
    raw = read(run, "caption/raw", Caption)
    usable = {row.id: row.text for row in raw if row.status == "ok"}
    assert set(usable.values()) == {"alt text of number 0", "alt text of number 3", "the copy"} and len(raw) == 6
    for score in ("form", "judge"):
        assert {row.id for row in read(run, f"score/{score}/raw", Score)} == usable.keys()
    verdicts = [row for row in read(run, "verdict", Verdict) if row.caption == "raw"]
    assert {(row.key, row.candidate): row.chosen for row in verdicts} == {row.id: row.id in usable for row in raw}
    exported = read(run, "export/index", Exported)
    assert {row.caption_pass for row in exported} == {"raw", "dense"}
    assert {row.model for row in exported if row.caption_pass == "raw"} == {""}
    dense = {row.key: row.text for row in read(run, "caption/dense", Caption)}
    assert {row.key: row.text for row in read(run, "caption/best", Caption)} == dense
    assert recap("verify", "--run", run).stdout == ""


def test_a_shard_does_not_fail_for_images_without_words(tmp_path: Path) -> None:
    assert build_pass(tmp_path).max_error_share == 0.2
    for section, share in ((RAW, 1.0), ({**RAW, "max_error_share": 0.1}, 0.1)):
        p = build_raw(tmp_path, **section)
        assert (p.max_error_share, p.engines, p.shows_images) == (share, (), False)


@pytest.mark.slow
def test_copies_of_an_image_keep_words_of_their_own(tmp_path: Path, photos: Path) -> None:
    run = begin(tmp_path / "run", configure(photos, curate={"max_distance": 0, "share": True}))
    assert make(run).exit_code == 0
    assert [row.text for row in read(run, "caption/raw", Caption)][-1] == "the copy"
    assert len(read(run, "asked/caption/dense", Caption)) == len(read(run, "caption/dense", Caption)) - 1
    assert len(read(run, "score/judge/raw", Score)) == 3
    assert recap("verify", "--run", run).stdout == ""


@pytest.mark.slow
def test_words_follow_their_sql_and_what_it_reads(tmp_path: Path, photos: Path) -> None:
    run = begin(tmp_path / "run", configure(photos))
    assert make(run).exit_code == 0
    assert make(run).done == 0
    write(run, configure(photos, caption__raw={"words": "upper(alt_text)"}))
    refused = recap("run", "all", "--run", run, check=False)
    assert refused.returncode == 2 and "caption:raw: words: [alt_text] -> [upper(alt_text)]" in refused.stderr
    write(run, configure(photos, caption__dense={"recipe": "short"}))
    refused = recap("run", "all", "--run", run, check=False)
    assert "caption:best: its input caption/dense is stale: recipe.prompt" in refused.stderr
    assert make(run, stale="redo").exit_code == 0
    dense = {row.key: row.text for row in read(run, "caption/dense", Caption)}
    assert {row.key: row.text for row in read(run, "caption/best", Caption)} == dense


def test_a_try_shows_words(tmp_path: Path, photos: Path) -> None:
    run = begin(tmp_path / "run", configure(photos))
    assert "raw 0: alt text of number 3" in recap("try", "caption:raw", "--run", run).stdout
