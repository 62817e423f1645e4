"""Rules over the place of a caption within its group of the whole run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.execution.run_state import RunState
from tests.support.runs import begin, corpus, make, recap, sections, write

pytestmark = pytest.mark.slow
# 30 captions of images with an alt text and 60 of images without, in shards of 7 images.
GROUP, VALUE = "alt_text IS NULL", "hash(key || candidate) % 41"
FOUND = f"""SELECT {GROUP} AS name, {VALUE} AS value, keep, reason
    FROM caption JOIN image USING (key) JOIN verdict USING (key, candidate)"""


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balanced")
    run = begin(folder / "run", configure(corpus(folder / "photos", ["jpg"] * 45)))
    assert make(run).exit_code == 0
    return run


def configure(photos: Path, **settings: Any) -> dict[str, Any]:
    caption = {"recipe": "dense", "engine": "captioner", "num_candidates": 2}
    parts = sections(photos, caption__dense=caption, filter={"rules": {}, **settings})
    return {**parts, "source": {**parts["source"], "shard_size": 7}}


def judge(run: Path, **settings: Any) -> list[dict[str, Any]]:
    """Each caption's group, value and verdict, with these keys of `[filter]`."""
    write(run, configure(run.parent / "photos", **settings))
    assert make(run, "filter", stale="redo").exit_code == 0
    found: list[dict[str, Any]] = json.loads(recap("sql", FOUND, "--run", run, "--format", "json").stdout)
    return found


def rank(values: list[int], value: int) -> float:
    return (sum(one < value for one in values) + sum(one == value for one in values) / 2) / len(values)


def test_quantiles_are_of_the_group_in_the_whole_run(captioned: Path) -> None:
    rows = judge(captioned, rules={"best": "quantile >= 0.7"}, balance=GROUP, balance_by=VALUE)
    groups = defaultdict[bool, list[int]](list)
    for row in rows:
        groups[row["name"]].append(row["value"])
    assert sorted(map(len, groups.values())) == [30, 60]
    for row in rows:
        keep = rank(groups[row["name"]], row["value"]) >= 0.7
        assert (row["keep"], row["reason"]) == (keep, None if keep else "best")
    shares = [sum(row["keep"] for row in rows if row["name"] == name) / len(groups[name]) for name in groups]
    assert all(0.2 < share < 0.4 for share in shares)


def test_a_caption_without_a_value_is_refused_and_counts_for_nothing(captioned: Path) -> None:
    value = f"CASE WHEN {GROUP} THEN {VALUE} END"
    rows = judge(captioned, rules={"best": "quantile > 0.5"}, balance="1", balance_by=value)
    assert {row["reason"] for row in rows if not row["name"]} == {"best"}
    kept = [row["keep"] for row in rows if row["name"]]
    assert 0.3 < sum(kept) / len(kept) < 0.7


def test_what_a_rule_is_balanced_by_is_part_of_its_fingerprint(captioned: Path) -> None:
    rules = {"best": "quantile >= 0.5"}
    judge(captioned, rules=rules, balance=GROUP, balance_by=VALUE)
    write(captioned, configure(captioned.parent / "photos", rules=rules, balance="''", balance_by=VALUE))
    assert "stale" in recap("run", "filter", "--run", captioned, check=False).stderr
    assert len({(row["name"], row["keep"]) for row in judge(captioned, rules={})}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"best": "quantile > 0.5"}}, "filter.rules.best: 'quantile > 0.5' uses quantile"),
        ({"balance": "source"}, "balance and balance_by are both needed"),
        ({"balance": "source", "balance_by": "judgment"}, "filter.balance_by: 'judgment' uses judgment"),
        ({"balance": "count(*) OVER ()", "balance_by": "judge"}, "is not a valid SQL condition"),
        (
            {"rules": {"clean": "NOT list_contains(flags, 'refusl')"}},
            "filter.rules.clean: .* a flag that no caption can have: 'refusl' is none of .*; did you mean 'refusal'",
        ),
        ({"choose": "'prompt leak' IN flags"}, "filter.choose: .* 'prompt leak' is none of .* mean 'prompt_leak'"),
    ],
)
def test_unusable_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(begin(tmp_path / "run", configure(corpus(tmp_path / "photos", ["jpg"]), **settings)), "ingest")


def test_flags_of_every_competing_recipe_are_known(tmp_path: Path) -> None:
    parts = configure(corpus(tmp_path / "photos", ["jpg"]), rules={"clean": "NOT list_has(flags, 'shouting')"})
    run = begin(tmp_path / "run", {**parts, "caption.own": {"recipe": "mine", "engine": "captioner"}})
    (run / "flags").mkdir()
    (run / "flags" / "loud.toml").write_text("shouting = ['!!!']")
    (run / "recipes").mkdir()
    (run / "recipes" / "mine.toml").write_text('prompt = "Describe it."\nflags = "loud"')
    assert any(p.stage == "filter" for p in RunState(config.load(run)).passes)


def add_drafts(photos: Path, **settings: Any) -> dict[str, Any]:
    draft = {"caption__draft": {"recipe": "short", "engine": "captioner"}}
    return sections(photos, **draft, filter={"rules": {}, "choose": "judge", **settings})


def test_captions_that_do_not_compete_have_no_verdicts_and_are_not_exported(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", add_drafts(corpus(tmp_path / "photos", ["jpg", "cut", "png"]), captions=["dense"]))
    state = RunState(config.load(run))
    for stage in ("filter", "export"):
        (p,) = (p for p in state.passes if p.stage == stage)
        assert not any("draft" in folder for folder in p.depends_on)
    for what in ("ingest", "caption:dense", "score:judge:dense", "filter", "export"):
        assert make(run, what).exit_code == 0
    assert make(run).exit_code == 0
    rows = json.loads(recap("sql", "FROM verdict", "--run", run, "--format", "json").stdout)
    assert [(row["caption"], row["chosen"]) for row in rows] == [("dense", True)] * 2
    assert recap("verify", "--run", run).stdout == ""
    assert str(run) in recap("report", "--run", run).stdout
    write(run, add_drafts(tmp_path / "photos"))
    assert "filter: captions: ['dense'] -> None" in recap("run", "filter", "--run", run, check=False).stderr


def test_filter_captions_are_stamped_only_when_they_are_set(tmp_path: Path) -> None:
    for settings, expected in (({}, None), ({"captions": ["draft", "dense"]}, ["dense", "draft"])):
        run = begin(tmp_path / "run", add_drafts(corpus(tmp_path / "photos", ["jpg"]), **settings))
        (p,) = (p for p in RunState(config.load(run)).passes if p.stage == "filter")
        assert p.slice.get("captions") == expected and ("captions" in p.slice) == bool(settings)


@pytest.mark.parametrize(
    ("captions", "export", "message"),
    [
        (["dens"], {}, "filter.captions: 'dens' is none of dense, draft; did you mean 'dense'"),
        ([], {}, r"filter.captions: is \[\]; it must name at least one of dense, draft"),
        (["dense", "dense"], {}, "filter.captions: is .* each once"),
        (["dense"], {"texts": {"draft": 1.0}}, "export: uses captions of 'draft', which .filter. captions leaves out"),
    ],
)
def test_unusable_captions_are_named(tmp_path: Path, captions: list[str], export: Any, message: str) -> None:
    parts = add_drafts(corpus(tmp_path / "photos", ["jpg"]), captions=captions)
    with pytest.raises(ConfigError, match=message):
        RunState(config.load(begin(tmp_path / "run", {**parts, "export": export})))


def test_a_rule_is_a_condition_and_its_misspelt_score_is_named(captioned: Path) -> None:
    photos = captioned.parent / "photos"
    for sql, message in (
        ("judge", r"filter\.rules\.good: 'judge' is of type DOUBLE, not a condition; compare it, as in judge >= 0\.7"),
        ("judge > 0.5 -- good", r"filter\.rules\.good: .* ends with '-- good', which is no part of an expression"),
        ("judge > 0.5;", r"filter\.rules\.good: .* ends with ';', which is no part"),
        ("text", r"is of type VARCHAR, not a condition; compare it, as in text <> ''"),
        ("jugde >= 0.5", r"filter\.rules\.good: .* uses jugde; did you mean 'judge'\?"),
    ):
        write(captioned, configure(photos, rules={"good": sql}))
        with pytest.raises(ConfigError, match=message):
            list_passes(config.load(captioned))


def test_one_outlier_leaves_quantiles_as_they_are(captioned: Path) -> None:
    """Values in bins of equal width were all in one."""
    number = "hash(key || candidate) % 1000003"
    value = f"CASE WHEN key = '000000000000' THEN 1e15 ELSE {number} END"
    plain, skewed = (
        sum(row["keep"] for row in judge(captioned, rules={"best": "quantile >= 0.7"}, balance="1", balance_by=by))
        for by in (number, value)
    )
    assert 20 < plain < 35 and abs(skewed - plain) <= 2
