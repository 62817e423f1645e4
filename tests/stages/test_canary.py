"""The canary stage: spoiled copies of a share of captions are scored, and the report of what a score notices."""

from __future__ import annotations

import csv
import html
from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.storage import database
from stages.audit import describe_judges
from stages.audit.spoilers import KINDS
from tests.support.runs import begin, corpus, make, recap, sections
from tests.support.scoring import SENTENCE_RUBRIC

pytestmark = pytest.mark.slow


def query(run: Path, sql: str) -> list[tuple[object, ...]]:
    with database.connect_run(config.load(run)) as connection:
        return list(database.query_rows(connection, sql))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("canary") / "photos", ["jpg"] * 24)


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    run = begin(photos.parent / "run", sections(photos, canary={"share": 1.0}))
    assert make(run).exit_code == 0
    return run


def test_all_captions_have_copies_of_several_kinds_with_scores(run: Path) -> None:
    rows = query(run, "SELECT key, kind, value, status, name, text, change FROM canary ORDER BY key, kind")
    captions = dict(query(run, "SELECT key, text FROM caption WHERE status = 'ok'"))
    assert {key for key, *_ in rows} == set(captions)
    assert {"dropped", "repeated", "foreign_last", "other_caption", "invented"} <= {str(kind) for _, kind, *_ in rows}
    assert {str(kind) for _, kind, *_ in rows} <= KINDS.keys()
    assert {name for *_, name, _, _ in rows} == {"judge"}  # the text score asks no model
    assert all(text != captions[key] and change for key, *_, text, change in rows)
    assert all((status == "ok") == (value is not None) for _, _, value, status, *_ in rows)


def test_the_first_image_takes_nothing_from_another(run: Path) -> None:
    (first,) = query(run, "SELECT min(key) FROM canary")
    kinds = {kind for (kind,) in query(run, f"SELECT kind FROM canary WHERE key = '{first[0]}'")}
    assert "repeated" in kinds and not {"other_caption", "foreign_first"} & kinds


def test_the_query_says_what_a_score_notices(run: Path) -> None:
    lines = recap("query", "canaries", "--run", run, "--format", "csv").stdout.splitlines()
    assert lines[0].split(",")[:5] == ["name", "caption", "kind", "copies", "judged"]
    for line in csv.DictReader(lines):
        assert -1 <= float(line["low"]) <= float(line["detection"]) <= float(line["high"]) <= 1


def test_status_report_and_card_say_in_the_same_words_whether_a_judge_is_bad(run: Path) -> None:
    summary, *details = describe_judges(config.load(run))
    assert summary.startswith("judge judge of dense: BAD by 24 captions with spoiled copies: ")
    status = recap("status", "--run", run).stdout
    recap("report", "--run", run)
    report, card = (html.unescape((run / name).read_text()) for name in ("report.html", "export/README.md"))
    for line in (summary, *details):
        assert line in status and line.strip() in report and line.strip() in card
    assert "judge judge of" not in recap("status", "--run", run, "--json").stdout


def test_a_judge_that_notices_less_than_demanded_makes_the_run_an_error(run: Path) -> None:
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("[score.judge]", "[score.judge]\nmin_detection = 0.9"))
    try:
        stopped = recap("run", "all", "--run", run, check=False)
        assert stopped.returncode == 2  # nothing is stale: the key is in no stamp
        assert "score.judge.min_detection = 0.9: the judge of dense notices 0." in stopped.stderr
        assert "planted errors of the kind" in stopped.stderr and "Choose another judge or rubric" in stopped.stderr
        assert "filter" not in stopped.stdout + stopped.stderr
    finally:
        (run / "run.toml").write_text(text)
    assert recap("run", "all", "--run", run).returncode == 0


def test_a_demand_that_nothing_measures_is_an_error(photos: Path) -> None:
    demand = {"min_detection": 0.5}
    run = begin(photos.parent / "unmeasured", sections(photos, score__judge=demand))
    with pytest.raises(ConfigError, match=r"score\.judge\.min_detection: needs \[canary\]"):
        list_passes(config.load(run))
    run = begin(photos.parent / "untested", sections(photos, score__judge=demand, canary={"scores": ["form"]}))
    with pytest.raises(ConfigError, match=r"canary\.scores: .*judge.*min_detection"):
        list_passes(config.load(run))


def test_kinds_that_a_rubric_does_not_ask_about_must_exist(photos: Path) -> None:
    folder = photos.parent / "unasked/rubrics"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text(f'unasked = ["colours"]\n{SENTENCE_RUBRIC}')
    run = begin(folder.parent, sections(photos, canary={}, score__judge={"rubric": "mine"}))
    with pytest.raises(ConfigError, match=r"score\.judge: unasked.*did you mean 'colour'"):
        list_passes(config.load(run))


def test_copies_are_in_no_other_table(run: Path) -> None:
    (copies,) = query(run, "SELECT count(*) FROM canary WHERE text IN (SELECT caption FROM export)")
    captions = query(run, "SELECT count(*) FROM canary WHERE kind = 'other_caption'")
    assert copies[0] <= captions[0][0]  # the caption of another image is exported with that image


def test_a_share_is_seeded_and_part_of_a_larger_one(run: Path, photos: Path) -> None:
    half = begin(photos.parent / "half", sections(photos, canary={"share": 0.5}))
    assert make(half).exit_code == 0
    few, many = (set(query(one, "SELECT key, kind, text FROM canary")) for one in (half, run))
    assert few < many and few


def test_a_run_without_the_section_has_no_such_pass(photos: Path) -> None:
    run = begin(photos.parent / "without", sections(photos))
    assert "canary" not in {p.stage for p in list_passes(config.load(run))}


def test_scores_to_test_can_be_named(photos: Path) -> None:
    run = begin(photos.parent / "named", sections(photos, canary={"scores": ["form"], "share": 1.0}))
    assert {p.name for p in list_passes(config.load(run)) if p.stage == "canary"} == {"form"}
    run = begin(photos.parent / "wrong", sections(photos, canary={"scores": ["beauty"]}))
    with pytest.raises(ConfigError, match=r"canary\.scores: .*beauty"):
        list_passes(config.load(run))


def test_another_share_makes_copies_stale_and_nothing_else(run: Path) -> None:
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("share = 1.0", "share = 0.9"))
    try:
        assert "canary:judge:dense" in (stopped := recap("run", "all", "--run", run, check=False)).stderr
        assert stopped.returncode == 2 and "score:" not in stopped.stderr
    finally:
        (run / "run.toml").write_text(text)
