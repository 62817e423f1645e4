"""Rubric writers: modules of this directory that write a rubric for each image from captions of it.

A writer has

- `prepare(config, *, run, field) -> settings`: checks its keys of `[rubric.NAME]`; `pipeline.config.stamped` of the
  settings goes into the fingerprint;
- `engines(settings) -> tuple[str, ...]`: the names in `[engines]` that it uses;
- `write(inputs, *, settings, engines) -> Iterator[WrittenRubric]`: one for each `Evidence`, in order, lazily;
- `open_fields(settings) -> OpenFields`: the fields of its prompt that `given` of the section fills; by default none;
- `VERSION`: an integer, raised when equal inputs get other rubrics.

A writer knows no tables. Each input has at least as many teachers as must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.records import RubricCriterion, RubricStatus
from stages.text.given import Texts


class WriterOptions(Protocol):
    """The keys of `[rubric.NAME]` that belong to its writer."""

    @property
    def engine(self) -> str: ...

    @property
    def words(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The captions of one image that its rubric is written from."""

    key: str
    teachers: tuple[str, ...]  # one caption each
    student: tuple[str, ...]  # its captions, at least one
    num_agree: int  # teachers that must agree
    alt_text: str | None = None
    texts: Texts = field(default_factory=dict)  # about the image, by field of the prompt: what `given` has
    source_key: str = ""
    data: Callable[[], bytes]  # the bytes of the image file, read when called
    seed: int = 0

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class WrittenRubric:
    """A writer's output for one image: criteria, or a status that is not ok."""

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
    """At least half of the teachers, as in RubiCap: 3 of 5."""
    return math.ceil(num_teachers / 2)
