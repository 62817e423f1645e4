"""The canary stage: spoiled copies of a share of captions are scored, and the report of what a score notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.storage import database
from stages.audit.spoilers import KINDS
from tests.support.runs import begin, corpus, make, recap, sections

pytestmark = pytest.mark.slow


def query(run: Path, sql: str) -> list[tuple[object, ...]]:
    with database.connect_run(config.load(run)) as connection:
        return list(database.query_rows(connection, sql))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("canary") / "photos", ["jpg"] * 12)


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
    findings = {line.rsplit(",", 1)[1] for line in lines[1:]}
    assert findings <= {
        "fails on many copies",
        "too few copies to say",
        "prefers spoiled captions",
        "does not notice this",
        "notices some",
        "notices this",
    }


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
