"""Settings that all tests share, and the model that several of them load."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from tests.support.served import ModelServer

# Threads that wait for each other inside a tiny model's every layer are twenty times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all engines of a small machine share one core
# Where bytecode may not be kept, every process that a test starts compiles torch and transformers anew: 20 s each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

WITH_MODELS = (
    "tests/engines/test_engines.py",
    "tests/stages/test_rubric.py",
    "tests/stages/test_steps_on_vllm.py",
    "tests/training/",
)
LOADING_TORCH = {"processor", "tokenizer", "tiny_model"}  # fixtures
APART = {"test_disasters"}  # each takes long, and they share little

# No test times anything, and what CI finds a person must be able to find again.
settings.register_profile(
    "recap", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("recap")


class ByFile(LoadFileScheduling):
    """What the tests of a file share is made once, and one worker alone imports transformers."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "models" if file.startswith(WITH_MODELS) else nodeid if Path(file).stem in APART else file


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that import torch and transformers as slow: the import alone takes seconds."""
    for item in items:
        if not LOADING_TORCH.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Qwen2.5-VL of a third of a million parameters."""
    from tests.support import tiny

    return tiny.save_vision_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def vllm_flags() -> dict[str, Any]:
    """How vLLM is started for the tiny model, in process or as a server."""
    return {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "kv_cache_gib": 1}


@pytest.fixture(scope="session")
def served_flags(vllm_flags: dict[str, Any]) -> dict[str, Any]:
    """How it is served: with room for all that a committee says, and without the blanks that JSON may have, for an
    untrained model writes them without end."""
    tight = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    return {**vllm_flags, "max_model_len": 8192, "args": [f"--structured-outputs-config={tight}"]}


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path, served_flags: dict[str, Any]) -> Iterator[ModelServer]:
    """A vLLM server of the tiny model; it takes long to start, and whoever asks it leaves nothing behind."""
    from tests.support.served import serve_model

    with serve_model(tiny_model, **served_flags) as server:
        yield server
