"""Decides what is said of a run's progress: per pass done, missing, stale, failed rows, rate and time left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import database
from pipeline.ledger import Ledger
from pipeline.parts import last_words
from pipeline.passes import Pass
from pipeline.plan import format_spec
from pipeline.run import Runner
from pipeline.shard import work_folder
from pipeline.terminal import duration, short
from pipeline.watch import Running, Watch

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
    running: tuple[Running, ...]  # tasks of Slurm's that make shards of it now
    waiting: dict[str, int]  # why tasks wait, in Slurm's words -> tasks


def survey(runner: Runner, watch: Watch) -> list[PassStatus]:
    """Every pass of the run, in order."""
    rates = _rates(runner)
    return [_survey(runner, p, rates.get(p.folder), watch) for p in runner.passes]


def _survey(runner: Runner, p: Pass, rate: tuple[float, float] | None, watch: Watch) -> PassStatus:
    states = {shard: runner.ledger.state(p, shard) for shard in runner.wanted}
    missing = [shard for shard, s in states.items() if s.kind in ("missing", "behind", "blocked")]
    stale = [s.why for s in states.values() if s.kind == "stale"]
    statuses: Counter[str] = Counter()
    for state in states.values():
        statuses.update(state.stamp.statuses if state.stamp else {})
    per_shard, running = rate[1] if rate else None, watch.running(p)
    broken = {f"{shard:05d}": s.why for shard, s in states.items() if s.kind == "missing" and s.why}
    failures = {**broken, **dict(_failures(runner.ledger, p, missing))}
    silent = watch.silent(p, [shard for shard in missing if states[shard].kind != "blocked"])
    return PassStatus(
        title=p.title,
        num_shards=len(states),
        done=len(states) - len(missing) - len(stale),
        stale=len(stale),
        missing=format_spec(missing),
        num_missing=len(missing),
        num_rows=sum(s.stamp.num_rows for s in states.values() if s.stamp),
        statuses=dict(statuses),
        num_failed_rows=sum(num for status, num in statuses.items() if status in p.record.failed),
        rows_per_second=rate[0] if rate else None,
        seconds_left=per_shard * (len(missing) + len(stale)) / max(1, len(running)) if per_shard is not None else None,
        reasons=tuple(dict.fromkeys(stale))[:MAX_LINES],
        failures={**{f"{shard:05d}": why for shard, why in silent}, **failures},
        running=tuple(running),
        waiting=watch.waiting(p),
    )


def _failures(ledger: Ledger, p: Pass, shards: Sequence[int]) -> Iterator[tuple[str, str]]:
    if not (ledger.run.folder / ".work" / p.folder).is_dir():
        return
    for shard in shards:
        if (message := last_words(work_folder(ledger.run.folder, p.folder, shard))) is not None:
            yield f"{shard:05d}", message


def _rates(runner: Runner) -> dict[str, tuple[float, float]]:
    """Folder of a pass -> rows per second and seconds per shard, as measured."""
    sql = """SELECT stage, name, caption, sum(num_new_rows) / greatest(sum(seconds), 1e-9), avg(seconds)
        FROM stats WHERE num_new_rows > 0 GROUP BY ALL"""
    with database.connect(runner.run.folder) as connection:
        found = {row[:3]: row[3:] for row in database.rows(connection, sql)}
    return {p.folder: found[key] for p in runner.passes if (key := (p.stage, p.name, p.caption)) in found}


def table(passes: Sequence[PassStatus], watch: Watch) -> str:
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
    return "\n".join([*lines, *_notes(passes), *watch.served(), *asked])


def _row(p: PassStatus) -> tuple[str, ...]:
    return (
        p.title,
        f"{short(p.done)}/{short(p.num_shards)}",
        short(p.stale),
        short(p.num_missing),
        short(p.num_rows),
        short(p.num_failed_rows),
        "" if p.rows_per_second is None else f"{p.rows_per_second:,.1f}",
        "" if p.seconds_left is None else duration(p.seconds_left) if p.seconds_left else "-",
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
        for reason in p.reasons:
            yield f"stale {p.title}: {reason}"
        for shard, why in list(p.failures.items())[:MAX_LINES]:
            yield f"failed {p.title} {shard}: {why}"


def as_json(passes: Sequence[PassStatus]) -> list[dict[str, Any]]:
    return [asdict(p) for p in passes]
