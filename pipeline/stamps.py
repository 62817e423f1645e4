"""Decides how a whole run's states are known in seconds: stamps are kept, and read again where a file has changed.

A file is the one that was read while its name, time, size and inode are; what is kept lies in .work/stamps, and without
it the answers are the same. What a state means is the ledger's to say: shards that stand alike are judged once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from pipeline import tables
from pipeline.ledger import Kind, Ledger
from pipeline.passes import Pass
from pipeline.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

SETTLED = 2 * 10**9  # nanoseconds: a file written later than this before it was read may change within one clock tick
THREADS = 16  # that read stamps: a network file system answers each of them late
ABOUT = ("mtime", "size", "inode")  # of a file
SAID = ("num_rows", "digest", "head", "keys", "inputs", "statuses")  # by its stamp
NOTHING = (0, "", "", "", "", "")


class Overview:
    """The states of all shards of a plan."""

    def __init__(self, ledger: Ledger, plan: Plan, passes: Sequence[Pass]) -> None:
        self._ledger, self._plan, self._passes = ledger, plan, {p.folder: p for p in passes}
        self._kept = ledger.run.folder / ".work" / "stamps"
        self._columns: dict[str, dict[str, Any]] = {}
        self._standing: dict[str, Ints] = {}

    def kinds(self, p: Pass) -> npt.NDArray[np.str_]:
        """The kind of every shard's state, by shard."""
        import numpy as np

        alike, first = self._alike(p)
        kinds = np.array([self._ledger.state(p, int(shard)).kind for shard in first])
        return kinds[alike]

    def shards(self, p: Pass, *kinds: Kind) -> list[int]:
        """The shards whose state is one of these."""
        import numpy as np

        found: list[int] = np.flatnonzero(np.isin(self.kinds(p), kinds)).tolist()
        return found

    def reasons(self, p: Pass, kind: Kind) -> list[str]:
        """Why shards are of this kind, each reason once."""
        states = [self._ledger.state(p, int(shard)) for shard in self._alike(p)[1]]
        return list(dict.fromkeys(state.why for state in states if state.kind == kind))

    def num_rows(self, p: Pass) -> int:
        return int(self.columns(p.folder)["num_rows"].sum())

    def statuses(self, p: Pass) -> dict[str, int]:
        """Status -> rows, over all tables that are there."""
        import numpy as np

        total: dict[str, int] = {}
        texts, counts = np.unique(self.columns(p.folder)["statuses"], return_counts=True)
        for text, count in zip(texts, counts, strict=True):
            for status, num in json.loads(text or b"{}").items():
                total[status] = total.get(status, 0) + num * int(count)
        return dict(sorted(total.items()))

    def broken(self, p: Pass) -> list[int]:
        """Shards with a file in their table's place that is no whole table."""
        found: list[int] = self.columns(p.folder)["broken"]
        return found

    def _alike(self, p: Pass) -> tuple[Ints, Ints]:
        """Which shards stand alike, as a number for each, and the first shard of each number."""
        import numpy as np

        standing = self._stand(p)
        _, first, alike = np.unique(standing, return_index=True, return_inverse=True)
        return alike, first

    def _stand(self, p: Pass) -> Ints:
        """For each shard a number that is equal where all is equal that its state depends on."""
        import numpy as np

        if p.folder not in self._standing:
            own = self.columns(p.folder)
            names = list(p.reads) or ["plan"]
            standing = _merged(_codes(own["head"]), _codes(own["keys"]))
            wanted = [self.columns(name)["digest"] if p.reads else self._plan_digests for name in names]
            same_keys = own["keys"] == json.dumps(sorted(names)).encode()
            recorded = own["inputs"].astype(f"S{64 * len(names)}").view("S64").reshape(-1, len(names))
            for i, name in enumerate(sorted(names)):
                same = same_keys & (recorded[:, i] == wanted[names.index(name)])
                standing = _merged(standing, same.astype(np.int64))
            for folder in p.reads:
                standing = _merged(standing, self._stand(self._passes[folder]))
            self._standing[p.folder] = standing
        return self._standing[p.folder]

    def columns(self, folder: str) -> dict[str, Any]:
        """What the stamps of a folder say, each an array by shard; empty strings where there is no table."""
        if folder not in self._columns:
            self._columns[folder] = self._spread(self._current(folder))
        return self._columns[folder]

    def _spread(self, known: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np

        shards, num = known["shard"], self._plan.num_shards
        planned = shards < num
        spread: dict[str, Any] = {"broken": known["broken"]}
        for name in SAID:
            spread[name] = np.zeros(num, known[name].dtype)
            spread[name][shards[planned]] = known[name][planned]
        return spread

    def _current(self, folder: str) -> dict[str, Any]:
        """The folder's stamps as they are now; what was read is kept for the next time."""
        import numpy as np

        seen, kept = _listing(self.run_folder / folder), _load(self._file(folder))
        at = np.searchsorted(kept["shard"], seen["shard"]).clip(max=max(0, len(kept["shard"]) - 1))
        same = np.full(len(at), len(kept["shard"]) > 0)
        if len(kept["shard"]):
            for name in ("shard", *ABOUT):
                same &= kept[name][at] == seen[name]
        fresh = np.flatnonzero(~same)
        read = list(self._read(folder, seen["shard"][fresh]))
        whole = np.ones(len(at), bool)
        whole[fresh] = [one is not None for one in read]
        now = dict(seen)
        for name, values in zip(
            SAID, zip(*(one or NOTHING for one in read), strict=True) if read else [()] * 6, strict=True
        ):
            new = np.array(values, "i8" if name == "num_rows" else "S")
            now[name] = np.zeros(len(at), max(new.dtype, kept[name].dtype, key=lambda dtype: dtype.itemsize))
            now[name][same], now[name][fresh] = kept[name][at[same]], new
        if len(fresh) or len(kept["shard"]) != len(at):
            settled = whole & (now["mtime"] < time.time_ns() - SETTLED)
            _keep(self._file(folder), {name: column[settled] for name, column in now.items()})
        return {**{name: column[whole] for name, column in now.items()}, "broken": seen["shard"][~whole].tolist()}

    @property
    def run_folder(self) -> Path:
        return self._ledger.run.folder

    def _read(self, folder: str, shards: Ints) -> Iterator[tuple[Any, ...] | None]:
        paths = [f"{self.run_folder / folder}/{shard:05d}.parquet" for shard in shards]
        if len(paths) < 100:
            yield from map(_parsed, paths)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(_parsed, paths, chunksize=100)

    def _file(self, folder: str) -> Path:
        return self._kept / f"{folder.replace('/', '.')}.npz"

    @cached_property
    def _plan_digests(self) -> Any:
        """Of all shards; kept for as long as the plan is the same file."""
        import numpy as np

        about = (self.run_folder / "plan.parquet").stat()
        stamp = [about.st_mtime_ns, about.st_size, about.st_ino]
        kept = _load(self._kept / "plan.npz", ("plan", "digest"))
        if kept["plan"].tolist() != stamp:
            digests = [self._plan.digest(shard) for shard in range(self._plan.num_shards)]
            kept = {"plan": np.array(stamp), "digest": np.array(digests, "S64")}
            if about.st_mtime_ns < time.time_ns() - SETTLED:
                _keep(self._kept / "plan.npz", kept)
        return kept["digest"]


def _load(file: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """The kept columns; empty ones where nothing is kept, or nothing that reads."""
    import numpy as np

    names = names or ("shard", *ABOUT, *SAID)
    try:
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return {name: np.empty(0, "S1" if name in SAID[1:] else "i8") for name in names}


def _keep(file: Path, columns: Mapping[str, Any]) -> None:
    import numpy as np

    with suppress(OSError), tables.atomic(file, durable=False) as out:  # a run that may only be read is surveyed anew
        np.savez(out, **columns)


def _listing(folder: Path) -> dict[str, Any]:
    """Number, time, size and inode of every table file, by shard."""
    import numpy as np

    rows = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(".parquet") and name[:-8].isdigit():
                about = entry.stat()
                rows.append((int(name[:-8]), about.st_mtime_ns, about.st_size, about.st_ino))
    found = np.array(rows, np.int64).reshape(-1, 4)
    found = found[found[:, 0].argsort()]
    return {name: found[:, i] for i, name in enumerate(("shard", *ABOUT))}


def _parsed(path: str) -> tuple[Any, ...] | None:
    """What is kept of a stamp; None when the table is broken or has just gone."""
    try:
        stamp = tables.read_stamp(Path(path))
    except tables.BrokenTable:
        return None
    if stamp is None:
        return None
    recipe, names = stamp.recipe, sorted(stamp.recipe.inputs)
    head = dataclasses.replace(recipe, inputs={}).fingerprint
    inputs = "".join(recipe.inputs[name] for name in names)
    return stamp.num_rows, stamp.digest, head, json.dumps(names), inputs, json.dumps(stamp.statuses)


def _codes(column: Any) -> Ints:
    import numpy as np

    codes: Ints = np.unique(column, return_inverse=True)[1]
    return codes


def _merged(a: Ints, b: Ints) -> Ints:
    """A number for each pair."""
    import numpy as np

    codes: Ints = np.unique(a * (int(b.max(initial=0)) + 1) + b, return_inverse=True)[1]
    return codes
