"""The jobs that a run's passes become, and the blocks of shards that their tasks make.

How a job is written, submitted or watched is known elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeline.execution.passes import Pass


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, or one pass where other stages come between a stage's passes."""

    title: str  # the argument of `recap run`
    stage: str
    passes: tuple[Pass, ...]
    reads: frozenset[str]  # titles of the jobs that make its inputs
    reads_all: frozenset[str]  # those of them that have to end for all shards
    engines: frozenset[str]


def plan_jobs(passes: Sequence[Pass]) -> list[Job]:
    """The jobs of these passes in order: one for a stage, or one for each pass of a stage that others interrupt.

    A pass that reads all shards of another pass of its stage interrupts it too.
    """
    groups = [part for _, group in groupby(passes, key=lambda p: p.stage) for part in _divide(list(group))]
    stages = [group[0].stage for group in groups]
    parts: dict[str, list[Pass]] = {}  # by title
    for group in groups:
        parts |= {group[0].stage: group} if stages.count(group[0].stage) == 1 else {p.title: [p] for p in group}
    makers = {p.folder: title for title, part in parts.items() for p in part}

    def find_makers(folders: Iterable[str], title: str) -> frozenset[str]:
        return frozenset(makers[folder] for folder in folders if folder in makers) - {title}

    return [
        Job(
            title=title,
            stage=part[0].stage,
            passes=tuple(part),
            reads=find_makers((folder for p in part for folder in p.depends_on), title),
            reads_all=find_makers((folder for p in part for folder in p.reads_all), title),
            engines=frozenset(engine for p in part for engine in p.engines),
        )
        for title, part in parts.items()
    ]


def _divide(group: Sequence[Pass]) -> Iterator[list[Pass]]:
    """Divides a stage's passes before each that reads all shards of one before it."""
    part: list[Pass] = []
    for p in group:
        if part and {*p.reads_all} & {earlier.folder for earlier in part}:
            yield part
            part = []
        part.append(p)
    yield part


def find_block(shard: int, num_blocks: int, num_shards: int) -> int:
    """The block i of the blocks i/n of `parse_spec` that has a shard."""
    return ((shard + 1) * num_blocks - 1) // num_shards


@dataclass(frozen=True, kw_only=True)
class ShardBlock:
    """The shards of one task: block `number` of `num_blocks`."""

    number: int
    num_blocks: int
    num_shards: int  # of the plan that was divided


def parse_block(comment: str, index: int | None) -> ShardBlock | None:
    """The block of the task with this index, from the comment of its array; None for a job that makes no shards."""
    match = re.fullmatch(r"blocks=(\d+),offset=(\d+),shards=(\d+)", comment)
    if not match or index is None:
        return None
    num_blocks, offset, num_shards = map(int, match.groups())
    return ShardBlock(number=offset + index, num_blocks=num_blocks, num_shards=num_shards)
