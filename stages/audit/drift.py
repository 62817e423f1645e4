"""Whether a rate of yes and no has changed over shards, by an e-value that holds whenever one looks.

Pure functions over counts. They do not know what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

MAX_LOG = 700.0  # of a number that a float holds
ALARM = 20.0  # an e-value that a constant rate reaches, ever, with a probability of at most 1 / 20


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The evidence against a constant rate."""

    e_value: float  # 1 / e_value is the most that the probability of so much evidence can be at a constant rate
    change: int  # the shard, by its place, at which a change is likeliest
    before: float  # the rate of the shards before it
    after: float

    @property
    def is_alarm(self) -> bool:
        return self.e_value >= ALARM


def measure_drift(counts: Sequence[tuple[int, int]]) -> Drift:
    """The e-value of one change of the rate against a constant, unknown one.

    E_t = Q(x_1..x_t) / max_p P_p(x_1..x_t). Q bets on a change before shard k with weight 1 / (k (k + 1)), and within
    either part on Krichevsky and Trofimov's mixture over all rates (IEEE Trans. Inf. Theory 27, 1981). Under each
    constant rate p, Q / P_p is a nonnegative martingale that starts at 1, and E_t is at most that. Ville's inequality
    (1939): E_t ever reaches 1 / alpha with a probability of at most alpha, so that one may look after every shard. Bets
    are as in arXiv 2010.09686, the quotient of a mixture and the best likelihood as in arXiv 2102.00630.

    Args:
        counts: of each shard in order: (trials, successes); trials must be independent.

    >>> round(measure_drift([(20, 19)] * 10 + [(20, 10)] * 10).e_value) > 10**6
    True
    >>> measure_drift([(20, 19)] * 20).e_value < 1
    True
    """
    total = (sum(num for num, _ in counts), sum(hits for _, hits in counts))
    if not total[0]:
        return Drift(e_value=1.0, change=0, before=0.0, after=0.0)
    earlier = list(accumulate(counts, lambda a, b: (a[0] + b[0], a[1] + b[1])))[:-1]  # before shards 1, 2, ...
    parts = [(num, hits, total[0] - num, total[1] - hits) for num, hits in earlier]
    bets = [
        _log_mixture(*part[:2]) + _log_mixture(*part[2:]) - math.log(place * (place + 1))
        for place, part in enumerate(parts, start=1)
    ]
    later = _log_mixture(*total) - math.log(len(counts))  # changes that are still to come have the rest of the weight
    log_e = _add_logarithms([*bets, later]) - _log_likelihood(*total)
    change = max(range(len(bets)), key=bets.__getitem__) if bets else 0
    num, hits, num_after, hits_after = parts[change] if bets else (*total, 0, 0)
    return Drift(
        e_value=math.exp(min(MAX_LOG, log_e)),
        change=change + 1 if bets else 0,
        before=hits / max(1, num),
        after=hits_after / max(1, num_after),
    )


def mean_e_value(drifts: Sequence[Drift]) -> float:
    """The evidence of several, which need not be independent (Vovk and Wang, Ann. Statist. 49, 2021); 1.0 for none."""
    return math.fsum(one.e_value for one in drifts) / len(drifts) if drifts else 1.0


def _add_logarithms(values: Sequence[float]) -> float:
    """The logarithm of the sum of exponentials."""
    most = max(values)
    return most + math.log(math.fsum(math.exp(value - most) for value in values))


def _log_mixture(num: int, hits: int) -> float:
    """Logarithm of the mean of p^hits (1 - p)^(num - hits) over Beta(1/2, 1/2)."""
    return math.lgamma(hits + 0.5) + math.lgamma(num - hits + 0.5) - math.lgamma(num + 1) - math.log(math.pi)


def _log_likelihood(num: int, hits: int) -> float:
    """Of the rate that fits best."""
    return math.fsum(part * math.log(part / num) for part in (hits, num - hits) if part)
