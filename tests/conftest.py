"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test times anything, and what CI finds a person must be able to find again.
settings.register_profile(
    "recap", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("recap")
