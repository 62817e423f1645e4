"""Shares with confidence intervals, from labels of some captions and features of all.

Pure functions over arrays. They know neither files nor what an acceptable caption is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

NUM_FOLDS = 5
MIN_PER_CLASS = 4  # labels of either class below which nothing is predicted


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
    labels: Sequence[bool], labelled: np.ndarray, population: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Share:
    """The share of acceptable captions in a population of which some, drawn evenly, are labelled.

    A logistic regression predicts the labels from features; it is cross-fitted, so that no caption's prediction has
    seen its label. The predictions of all captions are corrected by the error on the labelled ones, with the weight
    that minimises the variance (prediction-powered inference, arXiv 2311.01453, section 6). Wilson's interval at the
    effective number of labels keeps its coverage near 0 and 1, where the normal interval loses it.

    Args:
        labels: whether each labelled caption is acceptable.
        labelled: their features, (n, d).
        population: the features of all captions, the labelled ones included, (N, d).

    Raises:
        ValueError: there are no labels, or more than captions.
    """
    import numpy as np

    y = np.asarray(labels, dtype=float)
    num, size = len(y), len(population)
    if not 0 < num <= size:
        raise ValueError(f"{num} labels of {size} captions; at least one, and at most all, can be labelled")
    plain = _estimate_from_labels(y, size, confidence)
    if min(y.sum(), num - y.sum()) < MIN_PER_CLASS:
        return plain
    own, everywhere = _predict_labels(y, labelled, population, seed)
    spread = everywhere.var()
    if spread == 0.0:
        return plain
    covariance = np.cov(own, y, bias=True)[0, 1]
    weight = float(np.clip(covariance / ((1 + num / size) * spread), 0.0, 1.0))
    errors = y - weight * own
    value = float(np.clip(weight * everywhere.mean() + errors.mean(), 0.0, 1.0))
    variance = float(weight**2 * spread / size + errors.var() / num)
    if not 0.0 < value < 1.0 or variance == 0.0:
        return plain
    low, high = wilson_interval(value, value * (1 - value) / variance, confidence=confidence)
    return Share(value=value, low=low, high=high, num_labels=num, num_captions=size, method="labels and features")


def _estimate_from_labels(y: np.ndarray, size: int, confidence: float) -> Share:
    low, high = wilson_interval(float(y.mean()), len(y), confidence=confidence)
    return Share(value=float(y.mean()), low=low, high=high, num_labels=len(y), num_captions=size, method="labels")


def _predict_labels(
    y: np.ndarray, labelled: np.ndarray, population: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for the labelled captions by models that have not seen them, and means over models for all."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    num_folds = int(min(NUM_FOLDS, y.sum(), len(y) - y.sum()))
    own, everywhere = np.empty(len(y)), np.zeros(len(population))
    for rest, held_out in StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(labelled, y):
        model = make_pipeline(StandardScaler(), LogisticRegression())
        model.fit(labelled[rest], y[rest])
        own[held_out] = model.predict_proba(labelled[held_out])[:, 1]
        everywhere += model.predict_proba(population)[:, 1] / num_folds
    return own, everywhere
