"""No manifest draws its pictures from a held-out world."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

from benchmarks.worlds import CHOICE, HELD_OUT, TEST
from tests.support.runs import ROOT


def list_numbers(value: Any) -> Iterator[int]:
    """All whole numbers at any depth, because seeds of more pictures may stand in any table."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from list_numbers(one)
    elif isinstance(value, int):
        yield value


def test_no_manifest_uses_a_held_out_world() -> None:
    files = sorted((ROOT / "manifests").rglob("*.toml"))
    used = {str(file): HELD_OUT.intersection(list_numbers(tomllib.loads(file.read_text()))) for file in files}
    assert files
    assert not any(used.values()), used


def test_worlds_differ() -> None:
    assert len(HELD_OUT) == len(TEST) + 1
    assert CHOICE not in TEST
