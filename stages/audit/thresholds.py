"""The threshold of a score above which captions are acceptable with a stated probability.

Learn then test (arXiv 2110.01052) with one fixed sequence of thresholds, from strict to lenient: the first that fails
its test ends the search, so no correction for many tests is needed. Thresholds come from the scores alone, never from
the labels; choosing the best-looking threshold on the labels would break the promise in half of all audits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.audit.intervals import bound_share_below

NUM_STEPS = 20  # thresholds that are tested, at equal steps of the share that is kept


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """A threshold and what is known of the captions at or above it; or why there is none."""

    precision: float  # [0, 1]: the target
    confidence: float  # [0, 1]: of the whole search
    threshold: float | None  # the most lenient that passed; None: none did
    kept: float = 0.0  # share of all captions at or above it
    bound: float = 0.0  # lower bound of the precision there
    num_labels: int = 0  # at or above it
    num_more: int = 0  # labels that would be needed, above the threshold that failed, at the share seen there


def find_threshold(
    scores: Sequence[float], labelled: Sequence[tuple[float, bool]], *, precision: float, confidence: float
) -> Guarantee:
    """
    Args:
        scores: of all captions.
        labelled: score and label of captions drawn evenly from all.
        precision: the share of acceptable captions that is wanted at or above the threshold, in (0, 1).
        confidence: the share of audits in which the promise must hold, in (0, 1).

    Raises:
        ValueError: no caption has a score, or the targets are outside (0, 1).
    """
    if not scores:
        raise ValueError("no caption has a score, so no threshold can be tested")
    for name, value in (("precision", precision), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must be between 0 and 1")
    best = Guarantee(precision=precision, confidence=confidence, threshold=None)
    for threshold in list_thresholds(scores, len(labelled), precision=precision, confidence=confidence):
        labels = [label for score, label in labelled if score >= threshold]
        bound = bound_share_below(sum(labels), len(labels), confidence=confidence)
        if bound < precision:
            num_more = count_missing_labels(sum(labels), len(labels), precision=precision, confidence=confidence)
            return Guarantee(**{**vars(best), "num_more": num_more})
        best = Guarantee(
            precision=precision,
            confidence=confidence,
            threshold=threshold,
            kept=sum(score >= threshold for score in scores) / len(scores),
            bound=bound,
            num_labels=len(labels),
        )
    return best


def list_thresholds(scores: Sequence[float], num_labels: int, *, precision: float, confidence: float) -> list[float]:
    """Thresholds from strict to lenient. The strictest leaves twice the labels that a faultless sample would need."""
    needed = 2 * math.ceil(math.log(1 - confidence) / math.log(precision))
    first = min(1.0, needed / max(1, num_labels))
    ordered = sorted(scores, reverse=True)
    shares = (first + (1 - first) * step / (NUM_STEPS - 1) for step in range(NUM_STEPS))
    ranks = (max(0, min(len(ordered), round(share * len(ordered))) - 1) for share in shares)
    return sorted({ordered[rank] for rank in ranks}, reverse=True)


def count_missing_labels(num_true: int, num: int, *, precision: float, confidence: float) -> int:
    """Labels needed beyond `num` for the bound to reach the precision at the share seen; 0 if no number would do."""
    share = num_true / num if num else 1.0
    if share <= precision:
        return 0
    total = max(num, 1)
    while bound_share_below(math.floor(share * total), total, confidence=confidence) < precision:
        total = math.ceil(total * 1.05) + 1
    return total - num
