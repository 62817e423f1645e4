"""Thresholds with a guarantee: the promise is kept, and what is missing is named."""

from __future__ import annotations

import numpy as np
import pytest

from stages.audit.thresholds import find_threshold, list_thresholds

SIZE, NUM_AUDITS = 3000, 200


def make_population(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random(SIZE)
    return scores, rng.random(SIZE) < 0.55 + 0.45 * scores


@pytest.mark.slow
@pytest.mark.parametrize("precision", [0.8, 0.9])
def test_the_promise_is_broken_no_more_often_than_it_says(precision: float) -> None:
    scores, labels = make_population(3)
    rng = np.random.default_rng(1)
    num_found = num_broken = 0
    for _ in range(NUM_AUDITS):
        drawn = rng.choice(SIZE, 300, replace=False)
        labelled = list(zip(scores[drawn].tolist(), labels[drawn].tolist(), strict=True))
        found = find_threshold(scores.tolist(), labelled, precision=precision, confidence=0.9)
        if found.threshold is not None:
            num_found += 1
            num_broken += labels[scores >= found.threshold].mean() < precision
    assert num_found > 0.5 * NUM_AUDITS
    assert num_broken <= 0.15 * NUM_AUDITS  # 10 % is allowed; more than 30 of 200 has a chance of 1 in 100


def test_thresholds_depend_on_scores_alone_and_go_from_strict_to_lenient() -> None:
    scores = make_population(3)[0].tolist()
    thresholds = list_thresholds(scores, 300, precision=0.9, confidence=0.9)
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] == min(scores)
    assert sum(score >= thresholds[0] for score in scores) / SIZE * 300 >= 22  # a faultless sample would pass


@pytest.mark.slow
def test_labels_that_are_missing_are_counted() -> None:
    scores = [place / 100 for place in range(100)]
    labelled = [(score, place % 12 != 0) for place, score in enumerate(scores)]  # 11 in 12: just above 0.9
    found = find_threshold(scores, labelled, precision=0.9, confidence=0.9)
    assert found.threshold is None
    assert found.num_more > 100


@pytest.mark.parametrize("precision", [0.0, 1.0])
def test_a_target_that_no_sample_reaches_is_refused(precision: float) -> None:
    with pytest.raises(ValueError, match="precision is"):
        find_threshold([0.5], [(0.5, True)], precision=precision, confidence=0.9)
