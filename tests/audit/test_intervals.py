"""Intervals of a share: they hold as often as they say, and features make them narrower, never much wider."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.audit.intervals import (
    bound_share_below,
    estimate_from_labels,
    estimate_share,
    fit_logistic,
    wilson_interval,
)

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
        covered += found.low <= labels.mean() <= found.high
        widths.append(found.width)
        plain_widths.append(estimate_from_labels(labels[drawn], SIZE).width)
    assert covered >= 0.88 * NUM_AUDITS  # 95 % is expected; fewer than 53 of 60 has a chance of 1 in 100
    assert np.mean(widths) <= 1.02 * np.mean(plain_widths)
    if signal >= 2.0:
        assert np.mean(widths) < 0.9 * np.mean(plain_widths)


def test_useless_features_change_nothing_when_few_labels_are_of_one_class() -> None:
    features = np.zeros((50, 2))
    found = estimate_share([True] * 18 + [False] * 2, features[:20], features)
    assert found.method == "labels"
    assert (found.low, found.high) == wilson_interval(0.9, 20 * 49 / 30)  # of a finite population


def test_when_all_captions_are_labelled_the_share_is_known() -> None:
    features, labels = make_population(share=0.8, signal=2.0, seed=1)
    found = estimate_share(labels[:90], features[:90], features[:90])
    assert found.low == found.value == found.high == pytest.approx(labels[:90].mean())


def test_a_population_of_which_a_part_is_known_has_wider_intervals() -> None:
    features, labels = make_population(share=0.8, signal=2.0, seed=1)
    few, many = (estimate_share(labels[:90], features[:90], features, size=size) for size in (SIZE, 50 * SIZE))
    assert few.width < many.width < estimate_from_labels(labels[:90], 50 * SIZE).width


def test_the_regression_is_the_usual_one_with_a_ridge_penalty() -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = make_population(share=0.8, signal=2.0, seed=2)
    features = np.column_stack([features, np.ones(SIZE)])  # a feature that does not vary changes nothing
    standardised = (features[:, :3] - features[:, :3].mean(axis=0)) / features[:, :3].std(axis=0)
    expected = LogisticRegression(tol=1e-8).fit(standardised, labels).predict_proba(standardised)[:, 1]
    assert fit_logistic(features, labels.astype(float))(features) == pytest.approx(expected, abs=1e-4)


def test_labels_that_a_feature_separates_are_fitted() -> None:
    features = np.arange(40.0)[:, None]
    predicted = fit_logistic(features, (features[:, 0] > 19).astype(float))(features)
    assert (predicted[:20] < 0.5).all() and (predicted[20:] > 0.5).all()


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
