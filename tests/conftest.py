"""Settings that all tests share, and the model that several of them load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Threads that wait for each other inside a tiny model's every layer are twenty times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test times anything, and what CI finds a person must be able to find again.
settings.register_profile(
    "recap", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("recap")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Qwen2.5-VL of a third of a million parameters."""
    from tests import tiny

    return tiny.make(tmp_path_factory.mktemp("tiny"))
