"""Decides what a writer of rubrics is: one module of this folder, from what was said of images to their rubrics.

A writer has

- `prepare(config, *, run, field) -> settings`: what it needs of `[rubric.NAME]`, checked; what
  `pipeline.config.stamped` makes of it goes into the fingerprint;
- `engines(settings) -> tuple[str, ...]`: the names in `[engines]` that it asks;
- `write(inputs, *, settings, engines) -> Iterator[Written]`: as many as inputs, in order, lazily;
- `VERSION`: an integer, raised when equal inputs get other rubrics.

It knows no tables. An input has as many teachers as must agree, or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.records import RubricCriterion, RubricStatus


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was said of one image."""

    key: str
    teachers: tuple[str, ...]  # a caption of each
    student: tuple[str, ...]  # its captions, at least one
    num_agree: int  # so many teachers make a committee's word
    alt_text: str | None = None
    source_key: str = ""
    data: Callable[[], bytes]  # the image file, read when it is called
    seed: int = 0

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class WrittenRubric:
    """A rubric as its writer left it."""

    criteria: tuple[RubricCriterion, ...] = ()
    status: RubricStatus = "ok"
    error: str | None = None
    prompt_hash: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        assert bool(self.criteria) == (self.status == "ok"), f"{self.status} with {len(self.criteria)} criteria"


def count_majority(num_teachers: int) -> int:
    """How many are at least half, as RubiCap has it: 3 of 5."""
    return math.ceil(num_teachers / 2)
