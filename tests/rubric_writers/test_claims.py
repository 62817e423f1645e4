"""The claims writer: criteria are what teachers agree on and the student misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given

from pipeline.records import RubricCriterion
from stages.rubric_writers import claims
from stages.scenes import claim_checks
from stages.scenes.claim_checks import Check, collect_claims
from stages.scenes.claims import (
    Claim,
)
from tests.support.scoring import (
    CAPTIONS,
    CHANGED,
    compute_digest,
    make_evidence,
    rubric_cases,
    write_criteria,
)


def list_texts(criteria: Sequence[RubricCriterion], how: str) -> list[str]:
    return [criterion.text for criterion in criteria if criterion.id.startswith(how)]


def test_criteria_are_what_teachers_agree_on_and_the_student_misses() -> None:
    teachers = [
        "There is a small red circle. There is a blue star. The blue star is left of the red circle. Two objects.",
        "A small red circle. A large blue star. The red circle is right of the blue star. Two objects.",
        "A red circle. A green ring. Two objects. The background is grey.",
    ]
    criteria = write_criteria(
        teachers, "A red circle. A purple cross. Two objects.", "A small red circle. Two objects."
    )
    assert [
        (d.text, d.severity, d.weight, d.agreed, d.missed) for d in criteria if d.id.startswith(("states", "avoids"))
    ] == [
        ("Says: object(blue star)", "critical", 3.0, 2, 1.0),
        ("Says: size(red circle, small)", "important", 2.0, 2, 0.5),
        ("Says: relation(blue star, left of, red circle)", "important", 2.0, 2, 1.0),
        ("Does not say: object(purple cross)", "critical", 3.0, 3, 0.5),
    ]
    assert list_texts(criteria, "only") == [
        "Of the kind count says something, and nothing besides: count(objects, 2)",
        "Of the kind background says nothing",
        "Of the kind object says something, and nothing besides: object(blue star); object(red circle)",
        "Of the kind size says something, and nothing besides: size(red circle, small)",
        "Of the kind texture says nothing",
        "Of the kind relation says something, and nothing besides: relation(blue star, left of, red circle)",
    ]
    assert list_texts(criteria, "plain") == [claim_checks.PLAIN]
    assert len({criterion.id for criterion in criteria}) == len(criteria)


def test_implied_directions_are_allowed_and_their_opposites_are_not() -> None:
    teachers = ["A red ring. The red ring is left of the blue star. The blue star is left of the green cross."] * 3
    (only,) = [d for d in write_criteria(teachers, "A red ring.") if d.id.startswith("only_relation")]
    check = claim_checks.parse_check(only.claim or "")
    assert check.is_met(collect_claims("The red ring is left of the green cross."))
    assert not check.is_met(collect_claims("The green cross is left of the red ring."))
    assert not check.is_met(collect_claims("A red ring."))


def test_one_teacher_cannot_confirm_a_claim() -> None:
    teachers = [
        "A red ring.",
        "A red ring.",
        "A red ring. A blue star.",
        "A red ring.",
        "A red ring. A blue star. A black heart.",
    ]
    criteria = write_criteria(teachers, "A red ring. A blue star. A black heart.")
    assert list_texts(criteria, "avoids") == ["Does not say: object(black heart)"]
    assert not list_texts(criteria, "states")


@given(rubric_cases())
def test_rubrics_are_independent_of_caption_order(case: tuple[list[str], list[str], Any]) -> None:
    teachers, student, criteria = case
    turned = write_criteria(teachers[::-1], *student[::-1])
    assert turned == criteria
    assert all(0 <= d.missed <= 1 and 0 <= d.agreed <= len(teachers) for d in criteria)
    assert all(d.missed > 0 for d in criteria if d.id.startswith(("states", "avoids")))
    assert all(claim_checks.parse_check(d.claim or "").json == d.claim for d in criteria)


def test_contradicting_teachers_agree_on_the_rest() -> None:
    criteria = write_criteria(["A small red ring. One object.", "A large red ring. One object."], "A blue star.")
    assert list_texts(criteria, "states") == ["Says: count(objects, 1)", "Says: object(red ring)"]
    assert list_texts(criteria, "only_size") == [
        "Of the kind size says nothing besides: size(red ring, large); size(red ring, small)"
    ]


def test_rubrics_are_empty_without_agreement() -> None:
    (outcome,) = claims.write([make_evidence(["A red ring.", "A blue star."], "A red ring.", num_agree=2)])
    assert (outcome.status, outcome.criteria, outcome.error) == (
        "empty",
        (),
        "there is nothing that 2 of its teachers say",
    )


def test_repeated_or_empty_sentences_are_not_plain() -> None:
    plain = Check(how="plain")
    assert plain.is_met(collect_claims("A red ring. There is a small red ring. One object."))
    for text in (
        "",
        "A red ring. A fine picture.",
        "A red ring. There is a red ring.",
        "A small red ring. A red ring.",
    ):
        assert not plain.is_met(collect_claims(text))


def test_version_changes_with_the_rubrics() -> None:
    rows = [
        write_criteria(teachers, student, num_agree=num_agree)
        for *teachers, student in CAPTIONS
        for num_agree in range(1, len(teachers))
    ]
    assert (claims.VERSION, compute_digest(rows)) == (3, "dc37836692ebbfa4"), CHANGED


def test_claims_are_formatted_for_readers() -> None:
    assert (
        claim_checks.format_claim(Claim("relation", "red ring", "left of", "blue star"))
        == "relation(red ring, left of, blue star)"
    )
    assert claim_checks.format_claim(Claim("background", "", "grey")) == "background(grey)"
