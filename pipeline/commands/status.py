"""The progress of a run by pass: shards done, missing and stale, failed rows, rate and time left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from pipeline.commands import estimate, sql
from pipeline.errors import BrokenTableError
from pipeline.execution.passes import Pass
from pipeline.execution.run_state import RunState
from pipeline.execution.state_index import StateIndex
from pipeline.execution.states import DUE
from pipeline.progress import escape_controls, format_count, format_duration
from pipeline.records import Stat
from pipeline.slurm.jobs import JobMonitor, RunningTask
from pipeline.storage import tables
from pipeline.storage.layout import table_path, work_folder
from pipeline.storage.parts import read_failure
from pipeline.storage.plan import format_spec

SAMPLE_SIZE = 100  # shards whose statistics are read to estimate a rate
MAX_LINES = 5  # of one kind in the table; the JSON has all


@dataclass(frozen=True, kw_only=True)
class PassStatus:
    """The progress of one pass."""

    title: str
    num_shards: int
    done: int
    stale: int
    missing: str  # shards as a Slurm --array expression
    num_missing: int
    num_rows: int
    statuses: dict[str, int]  # status -> rows of the finished shards
    num_failed_rows: int
    rows_per_second: float | None  # of one process, measured on finished shards
    seconds_left: float | None  # estimated for the tasks running now, or for one process
    against_estimate: str  # what finished shards took, compared with `recap estimate`
    reasons: tuple[str, ...]  # why shards are stale
    failures: dict[str, str]  # shard -> the error of its last attempt
    running: tuple[RunningTask, ...]  # Slurm tasks that are making its shards
    waiting: dict[str, int]  # Slurm's reason for waiting -> number of tasks


def summarise_passes(state: RunState, monitor: JobMonitor) -> list[PassStatus]:
    """Every pass of the run, in order."""
    index = StateIndex(state.states)
    return [_summarise_pass(state, p, index, monitor) for p in state.passes]


def _summarise_pass(state: RunState, p: Pass, index: StateIndex, monitor: JobMonitor) -> PassStatus:
    run = state.run.folder
    missing, stale, done = index.shards(p, *DUE, "blocked"), index.shards(p, "stale"), index.shards(p, "done")
    stats = _sample_stats(run, p, done)
    rate, statuses = _estimate_rate(stats), index.statuses(p)
    damaged = (*index.broken(p), *index.shards(p, "incomplete"))
    failures = dict(monitor.find_ended_early(p, index.shards(p, "missing", "behind")))
    failures |= {shard: state.states.state(p, shard).why for shard in damaged}
    failures |= dict(_read_errors(run, p, missing))
    return PassStatus(
        title=p.title,
        num_shards=state.plan.num_shards,
        done=len(done),
        stale=len(stale),
        missing=format_spec(missing),
        num_missing=len(missing),
        num_rows=index.num_rows(p),
        statuses=statuses,
        num_failed_rows=sum(num for status, num in statuses.items() if status in p.record.failed),
        rows_per_second=rate[0] if rate else None,
        seconds_left=rate[1] * (len(missing) + len(stale)) / max(1, monitor.num_workers(p)) if rate else None,
        against_estimate=_compare_with_estimate(state, p, stats),
        reasons=tuple(index.reasons(p, "stale")),
        failures={f"{shard:05d}": failures[shard] for shard in sorted(failures)},
        running=tuple(monitor.running_tasks(p)),
        waiting=monitor.pending_reasons(p),
    )


def _read_errors(run: Path, p: Pass, shards: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Missing shards whose last attempt failed, with its error."""
    work = run / ".work" / p.folder
    attempted = {int(name.name) for name in work.iterdir() if name.name.isdigit()} if work.is_dir() else set()
    for shard in sorted(attempted.intersection(shards)):
        if (message := read_failure(work_folder(run, p.folder, shard))) is not None:
            yield shard, message


def _sample_stats(run: Path, p: Pass, done: Sequence[int]) -> list[Stat]:
    """The statistics of an even sample of the finished shards."""
    step = max(1, len(done) // SAMPLE_SIZE)
    paths = [table_path(run / "stats", p.folder, shard) for shard in done[::step]]
    return [stat for path in paths for stat in _read_stats(path)]


def _compare_with_estimate(state: RunState, p: Pass, stats: Sequence[Stat]) -> str:
    footers = [state.states.footer("image", stat.shard) for stat in stats]
    return estimate.compare(
        estimate.read_estimate(state.run.folder),
        p.title,
        images=sum(footer.num_rows for footer in footers if footer),
        tokens=sum(stat.num_prompt_tokens + stat.num_output_tokens for stat in stats),
        seconds=sum(stat.seconds for stat in stats),
    )


def _estimate_rate(stats: Sequence[Stat]) -> tuple[float, float] | None:
    """Rows per second and seconds per shard."""
    if not stats:
        return None
    seconds = sum(stat.seconds for stat in stats)
    return sum(stat.num_rows for stat in stats) / max(seconds, 1e-9), seconds / len(stats)


def _read_stats(path: Path) -> Iterator[Stat]:
    with suppress(FileNotFoundError, BrokenTableError):  # nothing but the estimate depends on them
        yield from tables.read_rows(path, Stat)


def format_table(passes: Sequence[PassStatus], monitor: JobMonitor) -> str:
    """The progress as a text table, with a line for everything notable."""
    head = ("pass", "done", "stale", "missing", "rows", "failed", "rows/s", "left")
    rows = [head, *(_format_row(p) for p in passes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *aligned]))
    problem = [f"slurm: {monitor.problem}"] if monitor.problem else []
    return "\n".join([*lines, *_list_notes(passes), *monitor.server_lines(), *problem])


def _format_row(p: PassStatus) -> tuple[str, ...]:
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


def _list_notes(passes: Sequence[PassStatus]) -> Iterator[str]:
    for p in passes:
        if p.missing:
            yield f"missing {p.title}: --array={p.missing}"
        for task in p.running[:MAX_LINES]:
            yield f"running {p.title}: {task.shards} on {task.node} ({task.job})"
        if len(p.running) > MAX_LINES:
            yield f"running {p.title}: {len(p.running)} tasks in all"
        for why, num in p.waiting.items():
            yield f"waiting {p.title}: {num} tasks ({why})"
        if p.against_estimate:
            yield f"against the estimate, {p.title}: {p.against_estimate}"
        for reason in p.reasons[:MAX_LINES]:
            yield f"stale {p.title}: {reason}"
        for shard, why in list(p.failures.items())[:MAX_LINES]:
            yield f"failed {p.title} {shard}: {why}"


def print_passes(passes: Sequence[PassStatus], monitor: JobMonitor, format: str, out: IO[bytes]) -> None:
    """Prints the progress as a text table with notes, json, csv or parquet; the last two have nested values as JSON."""
    if format in ("table", "json"):
        text = escape_controls(format_table(passes, monitor)) if format == "table" else format_json(passes)
        out.write(f"{text}\n".encode())
        return
    rows = [{name: _flatten(value) for name, value in asdict(p).items()} for p in passes]
    if format == "parquet":
        import pyarrow as pa

        kinds = {"str": pa.string(), "int": pa.int64(), "float | None": pa.float64()}
        columns = [(field.name, kinds.get(str(field.type), pa.string())) for field in fields(PassStatus)]
        sql.print_parquet(pa.Table.from_pylist(rows, pa.schema(columns)), out)
    else:
        sql.print_rows([field.name for field in fields(PassStatus)], (tuple(row.values()) for row in rows), format, out)


def _flatten(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


def format_json(passes: Sequence[PassStatus]) -> str:
    return json.dumps([asdict(p) for p in passes], indent=2)
