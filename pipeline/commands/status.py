"""Decides what is said of a run's progress: per pass done, missing, stale, failed rows, rate and time left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BrokenTableError
from pipeline.execution.passes import Pass
from pipeline.execution.run_state import RunState
from pipeline.execution.states import DUE
from pipeline.progress import format_count, format_duration
from pipeline.records import Stat
from pipeline.slurm.jobs import JobMonitor, RunningTask
from pipeline.storage import tables
from pipeline.storage.layout import table_path, work_folder
from pipeline.storage.parts import read_failure
from pipeline.storage.plan import format_spec

SAMPLE = 100  # shards whose statistics are read for a rate
MAX_LINES = 5  # of a kind, for people; the JSON has all


@dataclass(frozen=True, kw_only=True)
class PassStatus:
    """Where one pass of a run stands."""

    title: str
    num_shards: int
    done: int
    stale: int
    missing: str  # shards to make, as a Slurm --array expression
    num_missing: int
    num_rows: int
    statuses: dict[str, int]  # status -> rows, of the shards that are there
    num_failed_rows: int
    rows_per_second: float | None  # of one process, over the shards made
    seconds_left: float | None  # for the tasks that run now, or one process
    reasons: tuple[str, ...]  # why what is stale is stale
    failures: dict[str, str]  # shard -> why it failed when it was last tried
    running: tuple[RunningTask, ...]  # tasks of Slurm's that make shards of it now
    waiting: dict[str, int]  # why tasks wait, in Slurm's words -> tasks


def summarise_passes(state: RunState, watch: JobMonitor) -> list[PassStatus]:
    """Every pass of the run, in order."""
    return [_survey(state, p, watch) for p in state.passes]


def _survey(state: RunState, p: Pass, watch: JobMonitor) -> PassStatus:
    run, missing = state.run.folder, state.index.shards(p, *DUE, "blocked")
    stale, done = state.index.shards(p, "stale"), state.index.shards(p, "done")
    rate, running, statuses = _rate(run, p, done), watch.running_tasks(p), state.index.statuses(p)
    silent = watch.find_ended_early(p, state.index.shards(p, "missing", "behind"))
    damaged = (*state.index.broken(p), *state.index.shards(p, "incomplete"))
    broken = {shard: state.states.state(p, shard).why for shard in damaged}
    failures = {**dict(silent), **broken, **dict(_failures(run, p, missing))}
    return PassStatus(
        title=p.title,
        num_shards=state.plan.num_shards,
        done=len(done),
        stale=len(stale),
        missing=format_spec(missing),
        num_missing=len(missing),
        num_rows=state.index.num_rows(p),
        statuses=statuses,
        num_failed_rows=sum(num for status, num in statuses.items() if status in p.record.failed),
        rows_per_second=rate[0] if rate else None,
        seconds_left=rate[1] * (len(missing) + len(stale)) / max(1, watch.num_workers(p)) if rate else None,
        reasons=tuple(state.index.reasons(p, "stale")),
        failures={f"{shard:05d}": failures[shard] for shard in sorted(failures)},
        running=tuple(running),
        waiting=watch.pending_reasons(p),
    )


def _failures(run: Path, p: Pass, shards: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Why shards that are missing failed when they were last tried."""
    work = run / ".work" / p.folder
    tried = {int(name.name) for name in work.iterdir() if name.name.isdigit()} if work.is_dir() else set()
    for shard in sorted(tried.intersection(shards)):
        if (message := read_failure(work_folder(run, p.folder, shard))) is not None:
            yield shard, message


def _rate(run: Path, p: Pass, done: Sequence[int]) -> tuple[float, float] | None:
    """Rows per second and seconds per shard, as measured, over shards drawn evenly from those done."""
    step = max(1, len(done) // SAMPLE)
    paths = [table_path(run / "stats", p.folder, shard) for shard in done[::step]]
    stats = [stat for path in paths for stat in _read(path) if stat.num_new_rows]
    if not stats:
        return None
    seconds = sum(stat.seconds for stat in stats)
    return sum(stat.num_new_rows for stat in stats) / max(seconds, 1e-9), seconds / len(stats)


def _read(path: Path) -> Iterator[Stat]:
    """None where there is no such file, or none that reads: nothing depends on it."""
    with suppress(FileNotFoundError, BrokenTableError):
        yield from tables.read_rows(path, Stat)


def format_table(passes: Sequence[PassStatus], watch: JobMonitor) -> str:
    """For people."""
    head = ("pass", "done", "stale", "missing", "rows", "failed", "rows/s", "left")
    rows = [head, *(_row(p) for p in passes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    asked = [f"slurm: {watch.problem}"] if watch.problem else []
    return "\n".join([*lines, *_notes(passes), *watch.server_lines(), *asked])


def _row(p: PassStatus) -> tuple[str, ...]:
    return (
        p.title,
        f"{format_count(p.done)}/{format_count(p.num_shards)}",
        format_count(p.stale),
        format_count(p.num_missing),
        format_count(p.num_rows),
        format_count(p.num_failed_rows),
        "" if p.rows_per_second is None else f"{p.rows_per_second:,.1f}",
        "" if p.seconds_left is None else format_duration(p.seconds_left) if p.seconds_left else "-",
    )


def _notes(passes: Sequence[PassStatus]) -> Iterator[str]:
    for p in passes:
        if p.missing:
            yield f"missing {p.title}: --array={p.missing}"
        for task in p.running[:MAX_LINES]:
            yield f"running {p.title}: {task.shards} on {task.node} ({task.job})"
        if len(p.running) > MAX_LINES:
            yield f"running {p.title}: {len(p.running)} tasks in all"
        for why, num in p.waiting.items():
            yield f"waiting {p.title}: {num} tasks ({why})"
        for reason in p.reasons[:MAX_LINES]:
            yield f"stale {p.title}: {reason}"
        for shard, why in list(p.failures.items())[:MAX_LINES]:
            yield f"failed {p.title} {shard}: {why}"


def as_json(passes: Sequence[PassStatus]) -> list[dict[str, Any]]:
    return [asdict(p) for p in passes]
