"""Kills, breaks and races runs, many times, and counts lost and doubled rows.

    python -m tests.support.disasters --kills 300                  # divided among the engines that start in seconds
    python -m tests.support.disasters --kills 10 --engine vllm     # or echo, server, transformers
    python -m tests.support.disasters --all                        # and all other disasters of these tests

Every stage is started, killed with SIGKILL at some moment, and started again, until it is done; then every table is
compared with that of an uninterrupted run. Only stages that use the engine are killed (for echo: all), and equally
often. Prints a line of JSON for each engine, and with --all one for each other program of OTHERS and the sums.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pyarrow.parquet as pq

from tests.support.runs import BAD, GOOD, begin, corpus, make, sections

STAGES = ("ingest", "caption", "score", "filter", "export")
KILLED = {"echo": STAGES, "server": ("caption", "score"), "transformers": ("caption",), "vllm": ("caption",)}
MIX = [*GOOD, *BAD, *GOOD, *GOOD, "cut", *GOOD, *GOOD]
AGE = 0.05  # seconds between parts, so that a short shard has some to adopt
AT_ONCE = {"echo": 0.45, "server": 0.45, "transformers": 0.1}  # engines that start in seconds -> share of the kills
OTHERS = ("syscalls", "shortages", "races", "flips")  # modules beside this one
MOST = 5  # kills of a stage of one run; then it may end, even on a slow machine
IMPORTED = {  # before `start`: otherwise most kills would hit imports
    "": ("__main__", "tests.support.runs", "pyarrow.parquet", "duckdb", "stages.export", "stages.scorers.judge"),
    "server": ("aiohttp",),
    "transformers": ("torch", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"),
}


@dataclass(kw_only=True)
class Toll:
    """What the kills did to the runs."""

    runs: int = 0
    kills: int = 0
    kills_by_stage: dict[str, int]
    rows: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    stats_lost: int = 0  # shards without statistics
    errors: int = 0  # injected into system calls
    tables_that_differ: int = 0  # in their bytes, where the engine is deterministic
    leftovers: int = 0  # unfinished files under a final folder

    @property
    def harm(self) -> int:
        return self.rows_lost + self.rows_doubled + self.stats_lost + self.tables_that_differ + self.leftovers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at least; as many of each stage")
    parser.add_argument("--engine", choices=[*AT_ONCE, "vllm"], help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="and faults of system calls and memory, races, flipped bits")
    args = parser.parse_args()
    if args.engine:
        toll = kill_runs_of(args.engine, kills=args.kills, seed=args.seed)
        print_toll(toll, engine=args.engine)
    command = [sys.executable, "-m", "tests.support.disasters", "--seed", str(args.seed)]
    kills = {kind: str(math.ceil(share * args.kills)) for kind, share in AT_ONCE.items()}
    commands = [[*command, "--engine", kind, "--kills", num] for kind, num in kills.items()]
    commands += [[sys.executable, "-m", f"tests.support.{name}"] for name in OTHERS if args.all]
    code, sums = 0, Counter[str]()
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, end="", flush=True)
        code = max(code, abs(done.returncode))
        found = json.loads(done.stdout) if done.stdout else {}
        sums.update({name: num for name, num in found.items() if isinstance(num, int)})
    harm = ("rows_lost", "rows_doubled", "stats_lost", "taken_for_damage", "wrong_answers")
    print(", ".join(f"{name} {sums[name]}" for name in ("kills", "errors", "tasks", "flips", "named", *harm)))
    sys.exit(code)


def print_toll(toll: Toll, **about: str) -> NoReturn:
    """Prints a line of JSON and ends the process; exit code 1 where something was lost."""
    print(json.dumps({**about, **asdict(toll)}))
    sys.exit(1 if toll.harm else 0)


def kill_runs_of(kind: str, *, kills: int, seed: int) -> Toll:
    """As `kill_runs`, with an engine of this kind."""
    alike = kind in ("echo", "server")
    early = [*IMPORTED[""], *IMPORTED.get(kind, ())]
    preload(early)
    with tempfile.TemporaryDirectory() as folder, configure_engines(kind, Path(folder)) as parts:
        return kill_runs(Path(folder), parts, kills=kills, seed=seed, alike=alike, stages=KILLED[kind])


def preload(modules: Sequence[str]) -> None:
    """Imports modules in the process that all others are forked from, if there is none yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


@contextmanager
def configure_engines(kind: str, folder: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Sections of run.toml for an engine."""
    if kind == "echo":
        yield {"engines__captioner": {"delay": 0.002}, "engines__judge": {"delay": 0.002}}
    elif kind == "server":
        from tests.support.faults import Faulty

        with Faulty() as server:
            asked = {"kind": "openai", "model": "echo", "base_url": server.url}
            yield {"engines__captioner": asked, "engines__judge": asked}
    else:
        from tests.support import tiny

        asked = {"kind": kind, "model": str(tiny.save_vision_model(folder / "model"))}
        asked |= {"enforce_eager": True, "kv_cache_gib": 1, "max_model_len": 2048} if kind == "vllm" else {}
        brief = {"max_tokens": 24, "ladder": []}  # an untrained model rarely ends by itself
        yield {"engines__captioner": asked, "engines__judge": {"kind": "echo"}, "caption__dense": brief}


def kill_runs(
    folder: Path,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    kills: int,
    seed: int,
    alike: bool = True,
    stages: tuple[str, ...] = STAGES,
) -> Toll:
    """Makes runs, killing them at random moments, until each of `stages` was killed often enough."""
    random, toll = Random(seed), Toll(kills_by_stage=dict.fromkeys(STAGES, 0))
    photos = corpus(folder / "photos", MIX * 2)
    asked = {"recipe": "short", "num_candidates": 2, **parts.get("caption__dense", {})}
    settings = sections(photos, **{**parts, "caption__dense": asked})
    reference = begin(folder / "quiet", settings)
    seconds = {stage: _time_stage(reference, stage) for stage in STAGES}
    wanted = dict.fromkeys(stages, -(-kills // len(stages)))
    while any(toll.kills_by_stage[stage] < num for stage, num in wanted.items()):
        run = folder / "run"
        run.mkdir()
        for name in ("run.toml", "plan.parquet"):
            shutil.copy(reference / name, run)
        for stage in STAGES:
            room = min(MOST, wanted.get(stage, 0) - toll.kills_by_stage[stage])
            toll.kills_by_stage[stage] += _kill_until_done(run, stage, random, seconds, most=room)
        toll.kills = sum(toll.kills_by_stage.values())
        toll.runs += 1
        compare(reference, run, toll, alike=alike)
        shutil.rmtree(run)
    return toll


def start(run: Path, what: str, **options: Any) -> BaseProcess:
    """`recap run` in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_stage, args=(run, what, options))
    process.start()
    return process


def run_stage(run: Path, what: str, options: dict[str, Any]) -> None:
    from pipeline.storage import parts

    os.dup2(os.open(log_file(run), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    parts.MAX_AGE = AGE
    sys.exit(make(run, what, **options).exit_code)


def log_file(run: Path) -> Path:
    return run.with_suffix(".log")


def _time_stage(run: Path, stage: str) -> float:
    begun = time.monotonic()
    process = start(run, stage)
    process.join()
    assert process.exitcode == 0, f"{stage} failed before anything was killed\n{log_file(run).read_text()[-3000:]}"
    return time.monotonic() - begun


def _kill_until_done(run: Path, stage: str, random: Random, seconds: dict[str, float], *, most: int) -> int:
    """Starts a stage until it is done; returns how often it was killed.

    Args:
        seconds: duration of each stage; updated when this one was not killed.
    """
    kills = 0
    while True:
        begun = time.monotonic()
        process = start(run, stage)
        process.join(random.uniform(0, seconds[stage]) if kills < most else None)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            if kills == 0:
                seconds[stage] = time.monotonic() - begun
            return kills
        output = log_file(run).read_text()[-3000:]
        assert process.exitcode == -signal.SIGKILL, f"{stage}: exit {process.exitcode} after {kills} kills\n{output}"
        kills += 1


def compare(reference: Path, run: Path, toll: Toll, *, alike: bool, but: tuple[str, ...] = ()) -> None:
    """Counts rows that a run lacks or has twice, compared with an uninterrupted one."""
    for name in sorted({*_list_tables(reference), *_list_tables(run)}):
        wanted, found = _count_ids(reference / name), _count_ids(run / name)
        toll.rows += sum(found.values())
        toll.rows_lost += sum((wanted - found).values())
        toll.rows_doubled += sum((found - wanted).values())
    wanted = [path.relative_to(reference) for path in (reference / "stats").rglob("*.parquet")]
    toll.stats_lost += sum(not (run / path).exists() or not pq.read_table(run / path).num_rows for path in wanted)
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith((".work", "stats")) and path.suffix not in but:
            if path.suffix == ".tmp":
                toll.leftovers += 1
                continue
            same = (reference / name).exists() and (reference / name).read_bytes() == path.read_bytes()
            # The first two have the folder's name, the third their digests.
            is_own = path.name in ("README.md", "croissant.json", "SHA256SUMS")
            toll.tables_that_differ += alike and not same and not is_own


def _list_tables(run: Path) -> Iterator[str]:
    folders = ("image", "caption", "score", "verdict", "export")
    return (str(path.relative_to(run)) for top in folders for path in (run / top).rglob("*.parquet"))


def _count_ids(path: Path) -> Counter[tuple[Any, ...]]:
    if not path.exists():
        return Counter()
    names = [n for n in ("key", "caption", "name", "candidate") if n in pq.read_schema(path).names]
    names = ["key"] if "export" in path.parts else names
    return Counter(tuple(row.values()) for row in pq.read_table(path, columns=names).to_pylist())


if __name__ == "__main__":
    main()
