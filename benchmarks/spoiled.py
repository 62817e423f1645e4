"""What a reviewer makes of spoiled captions: the share that read right and are false, by kind, with intervals.

The captions are people's English over known pictures (tests/data/captions.jsonl). Each has one spoiled copy of a seeded
kind, about equally many of each, and the verdict of a reviewer who read both.

    python -m benchmarks.spoiled            # prints the shares
    python -m benchmarks.spoiled --write    # spoils the captions again; copies that changed lose their verdict
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from stages.audit.intervals import wilson_interval
from stages.audit.spoilers import KINDS, SpoiledText, spoil_text

FILE = Path(__file__).parent.parent / "tests" / "data" / "captions.jsonl"
SEED = "0"


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """A caption with its spoiled copy, and a reviewer's verdict on this."""

    picture: str  # package/file, or what the picture shows if the writer only imagined it
    caption: str
    kind: str | None = None  # None: no kind finds anything to change
    spoiled: str | None = None
    change: str | None = None
    reads_right: bool | None = None  # plain, connected English; a repeated sentence counts as such
    is_false: bool | None = None  # of the picture; where a sentence was dropped or repeated: poorer in that way
    note: str | None = None  # why not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="spoil the captions again")
    about, rows = read_rows()
    if parser.parse_args().write:
        rows = spoil_rows(rows)
        lines = [{"about": about}, *({k: v for k, v in asdict(row).items() if v is not None} for row in rows)]
        FILE.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print_shares(rows)


def read_rows() -> tuple[str, list[Reviewed]]:
    """What the file says of itself, and its rows."""
    header, *lines = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return header["about"], [Reviewed(**line) for line in lines]


def list_copies(rows: Sequence[Reviewed]) -> Sequence[Mapping[str, SpoiledText]]:
    """For each caption its copies by kind. What they take from another caption is from one of another picture."""
    found = []
    for number, row in enumerate(rows):
        others = [one.caption for one in rows if one.picture != row.picture]
        other = Random(f"{SEED}/{number}").choice(others)
        found.append({copy.kind: copy for copy in spoil_text(row.caption, seed=f"{SEED}/{number}", other=other)})
    return found


def spoil_rows(rows: Sequence[Reviewed]) -> list[Reviewed]:
    """The rows with today's copies. A row keeps its kind while that finds something to change."""
    copies = list_copies(rows)
    kinds = [row.kind if row.kind in found else None for row, found in zip(rows, copies, strict=True)]
    num = Counter(kinds)
    rarity = Counter(kind for found in copies for kind in found)
    fewest_first = sorted(range(len(rows)), key=lambda number: (len(copies[number]), number))
    for number in fewest_first:
        if kinds[number] is None and copies[number]:
            kinds[number] = min(copies[number], key=lambda kind: (num[kind], rarity[kind]))
            num[kinds[number]] += 1
    return [update_row(row, found.get(kind or "")) for row, found, kind in zip(rows, copies, kinds, strict=True)]


def update_row(row: Reviewed, copy: SpoiledText | None) -> Reviewed:
    """The row with a copy; its verdict goes if that is another than before."""
    new: dict[str, Any] = {"kind": None, "spoiled": None, "change": None}
    if copy is not None:
        new = {"kind": copy.kind, "spoiled": copy.text, "change": copy.change}
    if (row.kind, row.spoiled) != (new["kind"], new["spoiled"]):
        new |= {"reads_right": None, "is_false": None, "note": None}
    return replace(row, **new)


def print_shares(rows: Sequence[Reviewed]) -> None:
    """Prints the shares of copies that read right, are false, and both."""
    print(f"{len(rows)} captions, {sum(row.kind is None for row in rows)} of them without a copy")
    print(f"{'kind':16}{'copies':>7}{'reads right':>13}{'is false':>10}{'both':>7}  95 % interval")
    reviewed = [row for row in rows if row.reads_right is not None]
    for kind in (*sorted(KINDS), "all"):
        some = [row for row in reviewed if kind in (row.kind, "all")]
        num, both = max(1, len(some)), compute_share(some)
        right, false = sum(bool(row.reads_right) for row in some) / num, sum(bool(row.is_false) for row in some) / num
        low, high = wilson_interval(both, len(some))
        print(f"{kind:16}{len(some):7}{right:13.3f}{false:10.3f}{both:7.3f}  {low:.3f} to {high:.3f}")


def compute_share(rows: Sequence[Reviewed]) -> float:
    """The share of reviewed copies that read right and are false."""
    return sum(bool(row.reads_right and row.is_false) for row in rows) / max(1, len(rows))


if __name__ == "__main__":
    main()
