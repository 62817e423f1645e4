"""Runs commands on one run at once, and counts lost and doubled rows.

    python -m tests.support.races --rounds 10

A round extends the plan from three processes while the corpus grows, makes a shard with two configurations, and makes
shards beside a retry of others. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline import config
from pipeline.commands import init
from pipeline.storage.plan import Plan
from tests.support import disasters
from tests.support.disasters import IMPORTED, STAGES, Toll, compare, print_toll
from tests.support.runs import begin, corpus, make, sections, write

NUM_IMAGES, SHARD_SIZE = 12, 4


def race(folder: Path, *, rounds: int) -> Toll:
    """Lets commands race `rounds` times."""
    disasters.preload(IMPORTED[""])
    toll = Toll(kills_by_stage=dict.fromkeys(STAGES, 0))
    photos = corpus(folder / "photos", ["jpg"] * NUM_IMAGES)
    engine = {"error_share": 0.3, "delay": 0.01}
    parts = sections(photos, source={"shard_size": SHARD_SIZE}, engines__captioner=engine)
    other = sections(
        photos, source={"shard_size": SHARD_SIZE}, engines__captioner=engine, caption__dense={"temperature": 0.5}
    )
    ready = begin(folder / "ready", parts, max_error_share=1.0)
    assert make(ready, "ingest").exit_code == 0
    references = []
    for name, changes in (("one", parts), ("other", other)):
        references.append(write(Path(shutil.copytree(ready, folder / name)), changes, max_error_share=1.0))
        assert make(references[-1], "caption", stale="redo").exit_code == 0
    for number in range(rounds):
        _race_plans(folder / f"plans {number}", toll)
        _race_configurations(ready, references[1], other, folder / f"configurations {number}", toll)
        _race_retry(ready, references[0], folder / f"retry {number}", toll)
        toll.runs += 3
    return toll


def _race_plans(folder: Path, toll: Toll) -> None:
    photos = corpus(folder / "photos", ["jpg"] * NUM_IMAGES)
    run = begin(folder / "run", sections(photos, source={"shard_size": SHARD_SIZE}))
    before = _list_planned(run)
    processes = []
    for number in (1, 2, 3):
        corpus(photos, ["jpg"] * 3, first=number * NUM_IMAGES)
        processes.append(_start(run))
    _wait(processes)
    init.extend_plan(config.load(run))
    after = _list_planned(run)
    files = [file for _, file in after]
    toll.rows += len(after)
    toll.rows_lost += len({*before} - {*after}) + NUM_IMAGES + 9 - len(set(files))
    toll.rows_doubled += len(files) - len(set(files))


def _start(run: Path) -> BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=_extend_plan, args=(run,))
    process.start()
    return process


def _extend_plan(run: Path) -> None:
    init.extend_plan(config.load(run))


def _list_planned(run: Path) -> list[tuple[int, str]]:
    plan, shards = Plan.load(run / "plan.parquet")
    return [(shard, piece.file) for shard in shards for piece in plan.pieces(shard)]


def _race_configurations(
    ready: Path, reference: Path, other: dict[str, dict[str, object]], run: Path, toll: Toll
) -> None:
    shutil.copytree(ready, run)
    started = [disasters.start(run, "caption", stale="redo")]
    write(run, other, max_error_share=1.0)
    started.append(disasters.start(run, "caption", stale="redo"))
    _wait(started)
    assert make(run, "caption", stale="redo").exit_code == 0
    compare(reference, run, toll, alike=True)


def _race_retry(ready: Path, reference: Path, run: Path, toll: Toll) -> None:
    shutil.copytree(ready, run)
    assert make(run, "caption", shards="0").exit_code == 0
    _wait([disasters.start(run, "caption", retry=frozenset({"error"})), disasters.start(run, "caption")])
    compare(reference, run, toll, alike=False)


def _wait(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        toll = race(Path(folder), rounds=rounds)
    print_toll(toll, faults="races")


if __name__ == "__main__":
    main()
