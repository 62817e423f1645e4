"""Shares with confidence intervals, from labels of some captions and features of all.

Pure functions over arrays. They know neither files nor what an acceptable caption is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

NUM_FOLDS = 5
MIN_PER_CLASS = 4  # labels of either class below which nothing is predicted
MAX_STEPS = 25  # of Newton's method
MAX_LOGIT = 30.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """An estimated share with its interval."""

    value: float  # [0, 1]
    low: float
    high: float
    num_labels: int
    num_captions: int  # in the population
    method: Literal["labels", "labels and features"]

    @property
    def width(self) -> float:
        return self.high - self.low


def wilson_interval(share: float, num: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `num` draws; `num` may be an effective number.

    >>> [round(bound, 3) for bound in wilson_interval(0.9, 100)]
    [0.826, 0.945]
    """
    if num <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2) / (1 + z * z / num)
    return max(0.0, centre - half), min(1.0, centre + half)


def bound_share_below(num_true: int, num: int, *, confidence: float) -> float:
    """Clopper and Pearson's exact one-sided lower bound of a share (Biometrika 26, 1934).

    >>> round(bound_share_below(22, 22, confidence=0.9), 3)
    0.901
    """
    from scipy.stats import beta

    return float(beta.ppf(1 - confidence, num_true, num - num_true + 1)) if num_true else 0.0


def estimate_share(
    labels: Sequence[bool],
    labelled: np.ndarray,
    population: np.ndarray,
    *,
    size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Share:
    """The share of acceptable captions in a population of which some, drawn evenly, are labelled.

    A logistic regression predicts the labels from features; it is cross-fitted, so that no caption's prediction has
    seen its label. The predictions of all captions are corrected by the error on the labelled ones, with the weight
    that minimises the variance (prediction-powered inference, arXiv 2311.01453, section 6). The population is finite,
    and labelled captions are part of it, so that the variance is that of double sampling (Cochran, Sampling Techniques,
    1977, section 12.6). Wilson's interval at the effective number of labels keeps its coverage near 0 and 1, where the
    normal interval loses it.

    Args:
        labels: whether each labelled caption is acceptable.
        labelled: their features, (n, d).
        population: the features of all captions, or of many drawn evenly, the labelled ones included, (M, d).
        size: captions in the population; by default M.

    Raises:
        ValueError: there are no labels, or more than captions.
    """
    import numpy as np

    y = np.asarray(labels, dtype=float)
    num, num_known = len(y), len(population)
    size = num_known if size is None else size
    if not 0 < num <= num_known <= size:
        raise ValueError(f"{num} labels of {num_known} captions; at least one, and at most all, can be labelled")
    plain = estimate_from_labels(labels, size, confidence=confidence)
    if min(y.sum(), num - y.sum()) < MIN_PER_CLASS:
        return plain
    own, everywhere = _predict_labels(y, labelled, population, seed)
    covariance, spread = np.cov(own, y)[0, 1], own.var(ddof=1)
    weight = float(np.clip(covariance / spread, 0.0, 1.0)) if spread else 0.0
    errors = y - weight * own
    value = float(np.clip(weight * everywhere.mean() + errors.mean(), 0.0, 1.0))
    variance = (1 / num - 1 / num_known) * errors.var(ddof=1) + (1 / num_known - 1 / size) * y.var(ddof=1)
    if not 0.0 < value < 1.0 or variance <= 0.0:
        return plain
    low, high = wilson_interval(value, value * (1 - value) / variance, confidence=confidence)
    return Share(value=value, low=low, high=high, num_labels=num, num_captions=size, method="labels and features")


def estimate_from_labels(labels: Sequence[bool], size: int, *, confidence: float = 0.95) -> Share:
    """The share of acceptable captions among `size`, from the labels of some, drawn evenly, alone."""
    num = len(labels)
    share = sum(map(bool, labels)) / num
    num_effective = num * (size - 1) / (size - num) if num < size else math.inf
    low, high = wilson_interval(share, num_effective, confidence=confidence)
    return Share(value=share, low=low, high=high, num_labels=num, num_captions=size, method="labels")


def _predict_labels(
    y: np.ndarray, labelled: np.ndarray, population: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for the labelled captions by models that have not seen them, and means over models for all."""
    import numpy as np

    num_folds = int(min(NUM_FOLDS, y.sum(), len(y) - y.sum()))
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(y)), y))
    folds = np.empty(len(y), int)
    folds[shuffled] = np.arange(len(y)) % num_folds  # each has its part of either class
    own, everywhere = np.empty(len(y)), np.zeros(len(population))
    for fold in range(num_folds):
        rest = folds != fold
        predict = fit_logistic(labelled[rest], y[rest])
        own[~rest] = predict(labelled[~rest])
        everywhere += predict(population) / num_folds
    return own, everywhere


def fit_logistic(features: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic regression on standardised features, with a ridge penalty of 1, by Newton's method.

    Args:
        features: (n, d).
        y: 0 or 1, both of them, (n,).

    Returns:
        A function from features, (m, d), to probabilities, (m,).
    """
    import numpy as np

    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread[spread == 0] = 1.0

    def extend(values: np.ndarray) -> np.ndarray:
        return np.column_stack([(values - mean) / spread, np.ones(len(values))])

    def predict(weights: np.ndarray, extended: np.ndarray) -> np.ndarray:
        logits: np.ndarray = np.clip(extended @ weights, -MAX_LOGIT, MAX_LOGIT)
        return np.asarray(1 / (1 + np.exp(-logits)))

    known = extend(features)
    penalty = np.ones(known.shape[1])
    penalty[-1] = 1e-6  # the constant is free
    weights = np.zeros(known.shape[1])
    for _ in range(MAX_STEPS):
        probabilities = predict(weights, known)
        gradient = known.T @ (y - probabilities) - penalty * weights
        curvature = (known.T * (probabilities * (1 - probabilities))) @ known + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights += step
        if np.abs(step).max() < 1e-6:
            break
    return lambda values: predict(weights, extend(values))
