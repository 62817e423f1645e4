"""Flips single bits in every kind of file of a finished run, and counts those that `recap verify` does not name.

    python -m tests.support.flips --flips 1000

A flip that is not named counts as a wrong answer if any view of the run then gives other rows. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pipeline import config
from pipeline.errors import MachineError, QueryError
from pipeline.records import Step
from pipeline.storage import database, tables
from pipeline.storage.payloads import SUMS
from tests.support.runs import begin, corpus, make, recap, sections

UNPROTECTED = ("run.toml",)  # the user's own
VIEWS = ("plan", "image", "caption", "score", "verdict", "stats", "step", "export")


@dataclass(kw_only=True)
class Flips:
    """What `recap verify` made of flipped bits."""

    flips: int = 0
    named: int = 0
    wrong_answers: int = 0  # of queries, in spite of which verify named nothing
    by_kind: Counter[str] = field(default_factory=Counter)  # folder and extension -> flips


def finish_run(folder: Path) -> Path:
    """A finished run that has every kind of table."""
    parts = sections(
        corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 2), source={"shard_size": 4, "pack": True}
    )
    run = begin(folder / "run", parts)
    assert make(run).exit_code == 0
    step = tables.Provenance(stage="train", name="", version=1, slice={}, inputs={})
    tables.write_rows(run / "step" / "00000.parquet", Step, [Step(step=1, name="loss", value=0.5)], step)
    return run


def list_protected_files(run: Path) -> list[Path]:
    found = sorted(file for file in run.rglob("*") if file.is_file())
    return [file for file in found if ".work" not in file.parts and file.name not in UNPROTECTED]


def flip_bits(run: Path, *, num_flips: int, seed: int) -> Flips:
    """Flips bits and restores them.

    Several files are damaged at once, but never one with another that lists it: the plan, the list of digests, tables
    and files beside tables take turns.
    """
    noise, flips, answers, turn = Random(seed), Flips(), read_answers(run), 0
    while flips.flips < num_flips:
        turn += 1
        chosen = [file for file in list_protected_files(run) if _find_turn(run, file) == turn % 4]
        kept = {file: file.read_bytes() for file in chosen if turn <= 4 or turn % 4 == 0 or noise.random() < 0.7}
        for file in kept:
            flip_bit(file, noise)
            flips.by_kind[f"{file.parent.relative_to(run)}/*{file.suffix}"] += 1
        done = recap("verify", "--run", run, check=False)
        damaged = [line.partition("; to mend it: ")[0] for line in done.stdout.splitlines()]
        named = [file for file in kept if any(line.startswith(f"{file.relative_to(run)} ") for line in damaged)]
        flips.flips += len(kept)
        flips.named += len(named)
        for file in named:
            file.write_bytes(kept[file])
        if len(named) < len(kept):
            flips.wrong_answers += read_answers(run) != answers
        for file, data in kept.items():
            file.write_bytes(data)
    return flips


def _find_turn(run: Path, file: Path) -> int:
    if file.name in ("plan.parquet", SUMS):
        return 0 if file.name == SUMS else 1
    top, *inner = file.relative_to(run).parts
    return 2 if top == "shards" or (top == "export" and inner[0] != "index") else 3


def flip_bit(file: Path, noise: Random) -> None:
    data = bytearray(file.read_bytes())
    bit = noise.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def read_answers(run: Path) -> list[str]:
    """All rows of all views as text."""
    with database.connect_run(config.load(run)) as connection:
        return [_read_view(connection, view) for view in VIEWS]


def _read_view(connection: database.Connection, view: str) -> str:
    try:
        return repr(sorted(map(repr, database.query_rows(connection, f"FROM {view}"))))
    except (MachineError, QueryError):
        return "cannot be read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flips = flip_bits(finish_run(Path(folder)), num_flips=args.flips, seed=args.seed)
    print(json.dumps({"faults": "flipped bits", **vars(flips)}))
    sys.exit(1 if flips.named < flips.flips or flips.wrong_answers else 0)


if __name__ == "__main__":
    main()
