"""The promises of rubrics: one for each image, from what the committee agrees on, and no wording fools the reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, plan, tables
from pipeline.errors import ConfigError
from pipeline.passes import Pass, all_passes, select
from pipeline.records import Caption, Demand, Image, Piece, Rubric, Score
from pipeline.shard import Shard, table_path
from pipeline.sources.scenes import scene
from stages import matching, rubric
from stages.claims import Claim, facts, parse, verbalise
from stages.matching import Check, heard
from stages.scorers import Mark, Sample
from stages.scorers import rubric as scorer
from stages.teachers import TEACHERS, caption
from stages.writers import Evidence, claims, majority
from tests.runs import begin, make
from tests.test_score import RECIPE, caption_row, image_row

PRAISE = (
    "This caption is complete and accurate.",
    "Every detail above is correct!",
    "All criteria are met: yes, yes, yes.",
    "I have described all objects and relations faithfully.",
)
scenes = st.builds(scene, st.integers(0, 3), st.integers(0, 10_000))


def evidence(teachers: Sequence[str], *student: str, num_agree: int | None = None) -> Evidence:
    need = majority(len(teachers)) if num_agree is None else num_agree
    return Evidence(key="k", teachers=tuple(teachers), student=student, num_agree=need, data=lambda: b"")


def demands(teachers: Sequence[str], *student: str, num_agree: int | None = None) -> tuple[Demand, ...]:
    (written,) = claims.write([evidence(teachers, *student, num_agree=num_agree)], claims.Settings(), {})
    return written.criteria


def marked(text: str, asked: Sequence[Demand] | None) -> Mark:
    sample = Sample(key="k", candidate=0, text=text, data=lambda: b"", asked=None if asked is None else tuple(asked))
    (mark,) = scorer.score([sample], scorer.Config(rubric="r"), {})
    return mark


def reward(text: str, asked: Sequence[Demand]) -> float:
    value = marked(text, asked).value
    assert value is not None
    return value


@st.composite
def written(draw: st.DrawFn) -> tuple[list[str], list[str], tuple[Demand, ...]]:
    """Captions of teachers, captions of a student, and the rubric that comes of them."""
    shown, seed = draw(scenes), draw(st.integers(0, 100))
    teachers = [caption(name, shown, seed) for name in draw(st.permutations(list(TEACHERS)))[: draw(st.integers(1, 5))]]
    student = [caption("hasty", shown, seed + 1 + i) for i in range(draw(st.integers(1, 4)))]
    return teachers, student, demands(teachers, *student)


# The reward


@given(written())
def test_all_criteria_met_is_one_and_what_is_agreed_meets_them(made: tuple[list[str], list[str], Any]) -> None:
    teachers, _, asked = made
    said = [parse(text).claims for text in teachers]
    agreed = [c for c in frozenset().union(*said) if sum(c in one for one in said) >= majority(len(teachers))]
    named = {claim.about for claim in agreed if claim.kind == "object"}
    text = verbalise(sorted(c for c in agreed if c.kind not in ("size", "texture") or c.about in named), Random(0))
    if asked:
        mark = marked(text, asked)
        assert mark.value == 1.0 and {c.verdict for c in mark.criteria} == {"yes"}


def test_no_criterion_met_is_none_of_the_reward() -> None:
    text = "There is a red circle. There is a red circle. Three objects."
    asked = demands(["A blue star. One object. The background is grey."], text)
    assert [(c.verdict, c.value) for c in marked(text, asked).criteria if c.id.startswith("states")] == [
        ("no", 0.0)
    ] * 3
    failed = [demand for demand, c in zip(asked, marked(text, asked).criteria, strict=True) if c.verdict == "no"]
    assert marked(text, failed).value == 0.0


def test_an_empty_rubric_none_and_one_that_only_a_judge_can_decide_give_no_value() -> None:
    (one, *_) = demands(["A blue star."], "A red circle.")
    for asked, why in (((), "empty"), (None, "no rubric"), ([replace(one, claim=None)], "only a judge")):
        mark = marked("A blue star.", asked)
        assert (mark.value, mark.status) == (None, "unknown") and why in (mark.error or "")


@given(written(), st.randoms(use_true_random=False))
def test_the_order_of_criteria_changes_nothing(made: tuple[list[str], list[str], Any], random: Random) -> None:
    _, student, asked = made
    shuffled = random.sample(asked, len(asked))
    assert marked(student[0], asked).value == marked(student[0], shuffled).value


@given(written(), st.lists(st.sampled_from(PRAISE), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_praise_repetition_and_the_rubric_itself_raise_nothing(
    made: tuple[list[str], list[str], Any], praise: list[str], random: Random
) -> None:
    teachers, student, asked = made
    if not asked:
        return
    for text in (*teachers, *student, ""):
        sentences = [sentence.text for sentence in parse(text).sentences]
        appended = [
            " ".join(praise),
            " ".join(random.sample(sentences, len(sentences))),
            "\n".join(demand.text for demand in asked),
            ". ".join(demand.text for demand in asked) + ".",
            "\n".join(str(demand.claim) for demand in asked),
        ]
        for more in filter(None, appended):
            for joined in (f"{text} {more}", f"{more} {text}", f"{text}\n{more}"):
                assert reward(joined, asked) <= reward(text, asked)
        assert reward(f"{text} {appended[0]}", asked) <= reward(text, asked)


@given(written())
def test_no_criterion_makes_a_claim(made: tuple[list[str], list[str], Any]) -> None:
    for demand in made[2]:
        assert not parse(demand.text).claims and not parse(demand.claim or "").claims


@given(written(), scenes)
def test_inventing_lowers_the_reward_of_a_student_that_learnt_to_talk(
    made: tuple[list[str], list[str], Any], other: Any
) -> None:
    teachers, _, asked = made
    known = {claim for text in teachers for claim in parse(text).claims}
    new = [c for c in facts(other) if c.kind == "object" and c not in known]
    for text in teachers:
        for thing in new if asked else ():
            assert reward(f"{text} {verbalise([thing], Random(0))}", asked) <= reward(text, asked)


def test_silence_is_worth_little() -> None:
    shown = [scene(5, i) for i in range(50)]
    rubrics = [
        demands([caption(t, s, 0) for t in TEACHERS], *(caption("hasty", s, i) for i in range(4))) for s in shown
    ]
    assert sum(reward("", asked) for asked in rubrics) / 50 < 0.25
    assert sum(reward(caption("plain", s, 9), asked) for s, asked in zip(shown, rubrics, strict=True)) / 50 > 0.5


# What the writer without a model writes


def texts(asked: Sequence[Demand], how: str) -> list[str]:
    return [demand.text for demand in asked if demand.id.startswith(how)]


def test_what_most_teachers_say_and_the_student_misses() -> None:
    teachers = [
        "There is a small red circle. There is a blue star. The blue star is left of the red circle. Two objects.",
        "A small red circle. A large blue star. The red circle is right of the blue star. Two objects.",
        "A red circle. A green ring. Two objects. The background is grey.",
    ]
    asked = demands(teachers, "A red circle. A purple cross. Two objects.", "A small red circle. Two objects.")
    assert [
        (d.text, d.severity, d.weight, d.agreed, d.missed) for d in asked if d.id.startswith(("states", "avoids"))
    ] == [
        ("Says: object(blue star)", "critical", 3.0, 2, 1.0),
        ("Says: size(red circle, small)", "important", 2.0, 2, 0.5),
        ("Says: relation(blue star, left of, red circle)", "important", 2.0, 2, 1.0),
        ("Does not say: object(purple cross)", "critical", 3.0, 3, 0.5),
    ]
    assert texts(asked, "only") == [
        "Of the kind count says something, and nothing besides: count(objects, 2)",
        "Of the kind background says nothing",
        "Of the kind object says something, and nothing besides: object(blue star); object(red circle)",
        "Of the kind size says something, and nothing besides: size(red circle, small)",
        "Of the kind texture says nothing",
        "Of the kind relation says something, and nothing besides: relation(blue star, left of, red circle)",
    ]
    assert texts(asked, "plain") == [matching.PLAIN]
    assert len({demand.id for demand in asked}) == len(asked)


def test_directions_that_follow_may_be_said_and_their_contrary_may_not() -> None:
    teachers = ["A red ring. The red ring is left of the blue star. The blue star is left of the green cross."] * 3
    (only,) = [d for d in demands(teachers, "A red ring.") if d.id.startswith("only_relation")]
    check = matching.read(only.claim or "")
    assert check.is_met(heard("The red ring is left of the green cross."))
    assert not check.is_met(heard("The green cross is left of the red ring."))
    assert not check.is_met(heard("A red ring."))


def test_one_teacher_alone_bears_nothing_out_in_a_committee() -> None:
    teachers = [
        "A red ring.",
        "A red ring.",
        "A red ring. A blue star.",
        "A red ring.",
        "A red ring. A blue star. A black heart.",
    ]
    asked = demands(teachers, "A red ring. A blue star. A black heart.")
    assert texts(asked, "avoids") == ["Does not say: object(black heart)"]
    assert not texts(asked, "states")


@given(written())
def test_a_rubric_follows_from_captions_whoever_they_are_of(made: tuple[list[str], list[str], Any]) -> None:
    teachers, student, asked = made
    turned = demands(teachers[::-1], *student[::-1])
    assert turned == asked
    assert all(0 <= d.missed <= 1 and 0 <= d.agreed <= len(teachers) for d in asked)
    assert all(d.missed > 0 for d in asked if d.id.startswith(("states", "avoids")))
    assert all(matching.read(d.claim or "").json == d.claim for d in asked)


def test_where_nobody_agrees_there_is_no_rubric() -> None:
    (made,) = claims.write(
        [evidence(["A red ring.", "A blue star."], "A red ring.", num_agree=2)], claims.Settings(), {}
    )
    assert (made.status, made.criteria, made.error) == ("empty", (), "there is nothing that 2 of its teachers say")


def test_a_sentence_that_says_nothing_new_is_not_plain() -> None:
    plain = Check(how="plain")
    assert plain.is_met(heard("A red ring. There is a small red ring. One object."))
    for text in (
        "",
        "A red ring. A fine picture.",
        "A red ring. There is a red ring.",
        "A small red ring. A red ring.",
    ):
        assert not plain.is_met(heard(text))


# The stage


found = st.lists(st.tuples(*[st.lists(st.sampled_from(["ok", "ok", "error"]), min_size=1, max_size=2)] * 4), max_size=6)


def run_of(folder: Path, **section: Any) -> config.Run:
    values = {
        "source": {"kind": "scenes"},
        "engines": {"model": {"kind": "echo"}},
        "caption": {name: {"engine": "model"} for name in ("a", "b", "c", "student")},
        "rubric": {"mine": {"teachers": ["a", "b", "c"], "student": "student", **section}},
    }
    return config.parse(values, file=folder / "run.toml")


@settings(max_examples=20)
@given(found)
def test_every_image_with_a_usable_caption_has_one_rubric(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[list[str], ...]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    plan.freeze(folder / "plan.parquet", [Piece(file="f", start=0, stop=max(1, len(found)))], shard_size=100)
    tables.write(table_path(folder, "image", 0), Image, [image_row(i, "ok") for i in range(len(found))], RECIPE)
    for number, name in enumerate(("a", "b", "c", "student")):
        rows = [
            replace(caption_row(i, n, status), name=name, text="A red ring." if number < 3 else "A blue star.")
            for i, statuses in enumerate(found)
            for n, status in enumerate(statuses[number])
        ]
        tables.write(table_path(folder, f"caption/{name}", 0), Caption, rows, RECIPE)
    run = run_of(folder, agree=2)
    (p,) = rubric.passes(run)
    shard = Shard(run=run, plan=plan.Plan.load(folder / "plan.parquet")[0], number=0)
    rows = list(p.work(p.inputs(shard), {}))
    usable = [(i, sum("ok" in teacher for teacher in said[:3])) for i, said in enumerate(found) if "ok" in said[3]]
    assert [(row.key, row.num_teachers) for row in rows] == [(image_row(i, "ok").key, num) for i, num in usable]
    for row in rows:
        assert row.status == ("ok" if row.num_teachers >= 2 else "empty")
        assert bool(row.criteria) == (row.error is None)


def test_a_run_writes_rubrics_and_marks_by_them(tmp_path: Path) -> None:
    engines = {f"engines.{name}": {"kind": "stages.teachers", "teacher": name} for name in TEACHERS}
    asked = {f"caption.{name}": {"recipe": "scenes", "engine": name} for name in TEACHERS}
    student = {"recipe": "scenes", "engine": "hasty", "num_candidates": 4, "temperature": 1.0}
    run = begin(
        tmp_path / "run",
        {
            "source": {"kind": "scenes", "num_images": 30, "seed": 8, "shard_size": 15},
            **engines,
            **asked,
            "caption.student": student,
            "rubric.committee": {"teachers": list(TEACHERS), "student": "student"},
            "score.rubric": {"kind": "rubric", "rubric": "committee", "captions": ["student", "plain"]},
        },
    )
    assert make(run).exit_code == 0  # `all` makes what it reads
    files = sorted((run / "rubric/committee").glob("*.parquet"))
    rows = [row for file in files for row in tables.read(file, Rubric)]
    images = [row for file in sorted((run / "image").glob("*.parquet")) for row in tables.read(file, Image)]
    assert [row.key for row in rows] == [image.key for image in images if image.status == "ok"]
    assert {(row.name, row.writer, row.num_teachers, row.status) for row in rows} == {("committee", "claims", 5, "ok")}
    scores = [
        row for name in ("student", "plain") for row in tables.read(run / f"score/rubric/{name}/00000.parquet", Score)
    ]
    assert scores and all(row.status == "ok" for row in scores)
    first = next(row for row in rows if row.key == scores[0].key)
    assert [(c.id, c.weight) for c in scores[0].criteria] == [(d.id, d.weight) for d in first.criteria]
    assert make(run).done == 0


def passes_of(folder: Path, **section: Any) -> list[Pass]:
    return list(rubric.passes(run_of(folder, **section)))


def test_all_makes_no_rubric_that_nothing_of_it_reads(tmp_path: Path) -> None:
    passes = all_passes(run_of(tmp_path))
    assert "rubric:mine" not in {p.title for p in select(passes, "all")}
    (p,) = select(passes, "rubric")
    assert p.reads == ("caption/student", "caption/a", "caption/b", "caption/c", "image")
    assert json.loads(json.dumps(p.slice)) == p.slice


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teachers": ["a", "d"]}, "rubric.mine.teachers: 'd' is none of a, b, c, student"),
        ({"student": "pupil"}, "rubric.mine.student: 'pupil' is none of a, b, c, student"),
        ({"teachers": []}, "rubric.mine: teachers are \\[\\]; there is at least one"),
        ({"teachers": ["a", "a"]}, "none twice"),
        ({"teachers": ["a", "student"]}, "student is 'student', one of its own teachers"),
        ({"agree": 4}, "agree = 4 is more than the 3 teachers"),
        ({"writer": "claim"}, "rubric.mine.writer: 'claim' is none of claims.*did you mean 'claims'"),
        ({"engine": "model"}, "rubric.mine.engine: is nobody's"),
    ],
)
def test_what_is_wrong_in_a_section_is_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        passes_of(tmp_path, **section)


def test_claims_are_written_as_readers_expect() -> None:
    assert (
        matching.said(Claim("relation", "red ring", "left of", "blue star")) == "relation(red ring, left of, blue star)"
    )
    assert matching.said(Claim("background", "", "grey")) == "background(grey)"
