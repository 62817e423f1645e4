"""Drift over shards: a constant rate is hardly ever called a change, a change is called one soon."""

from __future__ import annotations

from random import Random

import pytest

from stages.audit.drift import Drift, mean_e_value, measure_drift

NUM_SHARDS = 40


def draw(rates: list[float], seed: int, *, num: int = 8) -> list[tuple[int, int]]:
    rng = Random(seed)
    sizes = [rng.randint(0, 2 * num) for _ in rates]
    return [(size, sum(rng.random() < rate for _ in range(size))) for size, rate in zip(sizes, rates, strict=True)]


def find_alarm(counts: list[tuple[int, int]]) -> int | None:
    """The first number of shards after which there is an alarm, if one looks after each."""
    return next((num for num in range(1, len(counts) + 1) if measure_drift(counts[:num]).is_alarm), None)


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.0])
def test_looking_after_every_shard_calls_a_constant_rate_a_change_in_at_most_one_run_in_twenty(rate: float) -> None:
    assert sum(find_alarm(draw([rate] * NUM_SHARDS, seed)) is not None for seed in range(60)) <= 3


def test_a_change_is_noticed_within_a_few_shards_and_placed() -> None:
    for seed in range(20):
        counts = draw([0.9] * 20 + [0.4] * 20, seed)
        alarm, found = find_alarm(counts), measure_drift(counts)
        assert alarm is not None and alarm <= 30
        assert abs(found.change - 20) <= 3 and found.before > 0.8 and found.after < 0.5


def test_nothing_is_concluded_from_nothing() -> None:
    for counts in ([], [(0, 0)] * 5, [(3, 2)]):
        assert not measure_drift(counts).is_alarm
    assert mean_e_value([]) == 1.0
    assert mean_e_value([Drift(e_value=e, change=0, before=0.0, after=0.0) for e in (1.0, 59.0)]) == 30.0


def test_the_e_value_is_at_most_one_on_average_when_the_rate_is_constant() -> None:
    values = [measure_drift(draw([0.8] * 10, seed, num=3)).e_value for seed in range(300)]
    assert sum(values) / len(values) <= 1.0
