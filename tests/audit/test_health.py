"""The health of judges: bad ones are called bad for the right reason, good ones are not.

Judges are functions of true and spoiled captions of the scenes world, or of measured rates; no model runs.
`python -m benchmarks.health` has more seeds, and the judge that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from benchmarks.health import BAD, GOOD, NUM_CAPTIONS, Pool, count_seeds, examine, make_teacher_pool
from stages.audit.health import RatedCopy, examine_judge
from stages.rubrics import UNASKED

NUM_SEEDS = 100


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_teacher_pool()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_judge_is_called_bad_for_the_right_reason(pool: Pool, name: str) -> None:
    judge, cause, kind = BAD[name]
    for seed in range(10):
        health = examine(pool, judge, seed)
        assert health.findings and (health.findings[0].cause, health.findings[0].kind) == (cause, kind), seed


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_a_judge_that_knows_the_truth_is_not_called_bad(pool: Pool, name: str) -> None:
    found = [examine(pool, GOOD[name], seed) for seed in range(NUM_SEEDS)]
    assert not [health.findings for health in found if health.is_bad]


def test_an_alarm_by_the_difference_alone_would_call_a_perfect_judge_bad(pool: Pool) -> None:
    judge, cause, kind = BAD["blind to numbers"]
    assert count_seeds(pool, judge, (cause, kind), 4) == {"right": 4, "bad": 4, "plain": 4}
    assert count_seeds(pool, judge, (cause, "colour"), 4)["right"] == 0
    counts = count_seeds(pool, GOOD["perfect, by caption"], None, 10)
    assert counts["bad"] == 0 < counts["plain"]


# Of the judge of `recap demo`, with share = 0.25: kind -> number of copies by sign and by what was accepted before.
# Copies of the first 43 captions that were judged.
SHIPPED: Mapping[str, Mapping[tuple[int, bool], int]] = {
    "attribute": {(1, True): 33, (0, True): 2, (0, False): 1},
    "colour": {(0, False): 3, (1, True): 40},
    "dropped": {(1, False): 10, (0, True): 30, (-1, False): 3},
    "foreign_first": {(1, True): 30, (1, False): 13},
    "foreign_last": {(1, True): 30, (1, False): 13},
    "foreign_middle": {(1, False): 12, (1, True): 29, (0, True): 1},
    "invented": {(1, False): 12, (1, True): 30},
    "number": {(0, False): 6, (1, True): 21, (0, True): 5, (-1, False): 3},
    "object": {(0, True): 4, (1, True): 37, (0, False): 1},
    "other_caption": {(1, False): 10, (1, True): 32},
    "repeated": {(0, True): 29, (1, False): 1, (-1, False): 11},
    "side": {(-1, False): 1, (0, False): 1},
}
SWAPS = ("attribute", "colour", "number", "object", "side")  # whose changed sentence the judge has judged by itself


def draw_shipped(seed: int) -> list[RatedCopy]:
    """Copies by the measured rates; a caption that is not wholly accepted has 0.8."""
    rng, copies = Random(seed), []
    for kind, counts in SHIPPED.items():
        num = NUM_CAPTIONS * sum(counts.values()) // 43
        for caption, (sign, accepted) in enumerate(rng.choices(list(counts), list(counts.values()), k=num)):
            original = 1.0 if accepted and kind not in SWAPS else 0.8
            copies.append(
                RatedCopy(
                    kind=kind,
                    caption=str(caption),
                    original=original,
                    copy=original - 0.2 * sign,
                    accepted=float(accepted) if kind in SWAPS else None,
                )
            )
    return copies


@pytest.mark.slow
def test_the_shipped_judge_is_not_called_bad_and_its_rubric_is_named_for_what_it_does_not_ask() -> None:
    found = [examine_judge(draw_shipped(seed), unasked=UNASKED) for seed in range(NUM_SEEDS)]
    assert not [health.findings for health in found if health.is_bad]
    notes = {finding.text for health in found for finding in health.findings}
    assert all("its rubric does not ask about " in note for note in notes) and notes
    alarmed = [examine_judge(draw_shipped(seed), unasked=()).is_bad for seed in range(NUM_SEEDS)]
    assert all(alarmed)  # by a rubric that asked for completeness, it would be bad
