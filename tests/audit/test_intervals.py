"""Intervals of a share: they hold as often as they say, and features make them narrower, never much wider."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.audit.intervals import bound_share_below, estimate_share, wilson_interval

SIZE, NUM_AUDITS = 2000, 60


def make_population(*, share: float, signal: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (SIZE, 3), and labels whose odds follow the first of them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(SIZE, 3))
    odds = signal * features[:, 0] + np.log(share / (1 - share))
    return features, rng.random(SIZE) < 1 / (1 + np.exp(-odds))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "signal"), [(0.8, 2.0), (0.95, 1.0), (0.5, 0.0)])
def test_intervals_cover_the_truth_and_are_no_wider_than_by_labels_alone(share: float, signal: float) -> None:
    features, labels = make_population(share=share, signal=signal, seed=5)
    rng = np.random.default_rng(0)
    covered, widths, plain_widths = 0, [], []
    for _ in range(NUM_AUDITS):
        drawn = rng.choice(SIZE, 100, replace=False)
        found = estimate_share(labels[drawn], features[drawn], features)
        low, high = wilson_interval(labels[drawn].mean(), 100)
        covered += found.low <= labels.mean() <= found.high
        widths.append(found.width)
        plain_widths.append(high - low)
    assert covered >= 0.88 * NUM_AUDITS  # 95 % is expected; fewer than 53 of 60 has a chance of 1 in 100
    assert np.mean(widths) <= 1.02 * np.mean(plain_widths)
    if signal >= 2.0:
        assert np.mean(widths) < 0.9 * np.mean(plain_widths)


def test_useless_features_change_nothing_when_few_labels_are_of_one_class() -> None:
    features = np.zeros((50, 2))
    found = estimate_share([True] * 18 + [False] * 2, features[:20], features)
    assert found.method == "labels"
    assert (found.low, found.high) == wilson_interval(0.9, 20)


@pytest.mark.slow
@given(st.integers(1, 200), st.floats(0.5, 0.99), st.data())
def test_the_lower_bound_is_the_share_at_which_so_many_are_just_likely_enough(
    num: int, confidence: float, data: st.DataObject
) -> None:
    from scipy.stats import binom

    num_true = data.draw(st.integers(1, num))
    bound = bound_share_below(num_true, num, confidence=confidence)
    assert binom.sf(num_true - 1, num, bound) == pytest.approx(1 - confidence, abs=1e-6)


@pytest.mark.parametrize("labels", [[], [True] * 4])
def test_labels_that_are_missing_or_too_many_are_refused(labels: list[bool]) -> None:
    with pytest.raises(ValueError, match=f"{len(labels)} labels of 3 captions"):
        estimate_share(labels, np.zeros((len(labels), 1)), np.zeros((3, 1)))
