"""The named queries give what the rows of a small run say."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from pipeline.commands.sql import read_query
from pipeline.records import Caption, Image, Score, Verdict
from pipeline.storage import database, tables
from tests.support.runs import begin, corpus, make, sections

NUM_COPIES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with copies of an image, two candidates and two scores of each caption, and a pass of one text."""
    folder = tmp_path_factory.mktemp("queries")
    photos = corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 4)
    for number in range(NUM_COPIES):
        (photos / f"copy{number}.jpg").write_bytes((photos / "00000.jpg").read_bytes())
    parts = sections(
        photos,
        caption__dense={"num_candidates": 2},
        engines__fixed={"kind": "echo", "text": "A cup is on the table."},
        caption__fixed={"recipe": "short", "engine": "fixed"},
        score__form={"captions": ["dense"]},
        score__judge={"captions": ["dense"]},
        filter={"rules": {"scored": "caption = 'dense'", "judged": "judge >= 0.63"}, "choose": "judge DESC"},
    )
    run = begin(folder / "run", parts)
    assert make(run).exit_code == 0
    return run


def query(run: Path, name: str) -> list[dict[str, Any]]:
    with database.connect(run) as connection:
        result = database.run_query(connection, read_query(name))
        names = [column[0] for column in result.description or ()]
        return [dict(zip(names, row, strict=True)) for row in database.fetch_rows(result)]


def read(run: Path, folder: str, record: type[Any]) -> list[Any]:
    return [row for path in sorted((run / folder).rglob("*.parquet")) for row in tables.read_rows(path, record)]


def read_values(run: Path, name: str) -> dict[tuple[str, int], float]:
    """The scores of a pass that are not null, by key and candidate."""
    rows = read(run, f"score/{name}/dense", Score)
    return {(row.key, row.candidate): row.value for row in rows if row.value is not None}


def test_overlap_counts_copies(run: Path) -> None:
    images = [row for row in read(run, "image", Image) if row.status == "ok"]
    (row,) = query(run, "overlap")
    assert (row["images"], row["copies"], row["groups"]) == (len(images), NUM_COPIES, 1)
    assert (row["contents"], row["largest_group"]) == (len({image.sha256 for image in images}), NUM_COPIES + 1)


def test_scores_of_one_caption_are_compared(run: Path) -> None:
    form, judge = (read_values(run, name) for name in ("form", "judge"))
    differences = {one: abs(form[one] - judge[one]) for one in form.keys() & judge.keys()}
    (row,) = query(run, "disagreement")
    assert (row["score"], row["other"], row["captions"]) == ("form", "judge", len(differences))
    assert row["mean_difference"] == pytest.approx(mean(differences.values()), abs=1e-3)
    disputed = query(run, "disputed")
    assert [one["difference"] for one in disputed] == pytest.approx(
        sorted(differences.values(), reverse=True)[: len(disputed)], abs=1e-3
    )


def test_best_refused_captions_come_first(run: Path) -> None:
    form, judge = (read_values(run, name) for name in ("form", "judge"))
    verdicts = [row for row in read(run, "verdict", Verdict) if row.caption == "dense" and not row.keep]
    refused = {(row.key, row.candidate) for row in verdicts} & (form.keys() | judge.keys())
    best = max(mean(scores[one] for scores in (form, judge) if one in scores) for one in refused)
    first, *_ = rows = query(run, "best_refused")
    assert first["value"] == pytest.approx(best, abs=1e-3)
    assert {(row["key"], row["candidate"]) for row in rows} <= refused


def test_later_candidates_raise_the_best_score(run: Path) -> None:
    judge, chosen = read_values(run, "judge"), [row for row in read(run, "verdict", Verdict) if row.chosen]
    row = next(row for row in query(run, "candidates") if row["score"] == "judge")
    firsts = [value for (_, candidate), value in judge.items() if candidate == 0]
    assert row["first_candidate"] == pytest.approx(mean(firsts), abs=1e-3)
    assert row["first_candidate"] < row["best_candidate"]
    assert row["chosen"] == len(chosen)
    assert row["chosen_after_the_first"] == sum(verdict.candidate > 0 for verdict in chosen)


def test_words_and_repeated_texts_are_counted(run: Path) -> None:
    captions = [row for row in read(run, "caption/dense", Caption) if row.status == "ok"]
    common = query(run, "vocabulary")[0]
    assert common["captions"] == sum(common["word"] in row.text.lower().split() for row in captions) > 0
    dense, fixed = query(run, "diversity")
    num_texts = len({row.text for row in captions})
    assert (dense["captions"], dense["distinct_texts"]) == (len(captions), num_texts)
    assert (fixed["commonest_opening"], fixed["its_share"], fixed["distinct_words"]) == ("a cup is on", 1.0, 6)
    (repeated,) = query(run, "repeats")
    assert (repeated["caption"], repeated["images"]) == ("fixed", fixed["captions"])


def test_shards_and_costs_add_up(run: Path) -> None:
    images, kept = read(run, "image", Image), [row for row in read(run, "verdict", Verdict) if row.chosen]
    assert {row["shard"] for row in query(run, "drift")} == {0, 1}
    assert all(row["times_median"] > 0 for row in query(run, "slowest"))
    caption = next(row for row in query(run, "cost_per_million") if row["name"] == "dense")
    tokens = sum(row.num_output_tokens or 0 for row in read(run, "caption/dense", Caption))
    assert caption["output_mtokens_per_million"] == pytest.approx(tokens / len(images), abs=0.01)
    hours, hours_of_kept = caption["hours_per_million"], caption["hours_per_million_kept"]
    assert hours_of_kept == pytest.approx(hours * len(images) / len(kept), rel=0.2, abs=0.02)
    assert sum(row["captions"] for row in query(run, "attempts")) == len(read(run, "caption", Caption))
    assert sum(row["images"] for row in query(run, "sizes")) == sum(image.status == "ok" for image in images)
    answers = sum(len(row.criteria) for row in read(run, "score", Score))
    assert sum(row["answers"] for row in query(run, "criteria")) == answers


def test_the_caption_pass_has_one_name_in_all_views(run: Path) -> None:
    with database.connect(run) as connection:
        for view in ("caption", "score", "verdict", "stats"):
            database.run_query(connection, f"SELECT caption FROM {view} LIMIT 1")
        same = "SELECT bool_and(caption = name) FROM caption"
        assert database.run_query(connection, same).fetchone() == (True,)
