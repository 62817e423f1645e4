"""Decides how a whole run's states are known in seconds: stamps are kept, and read again where a file has changed.

A file is the one that was read while its name, time, size and inode are; what is kept lies in .work/stamps, and without
it the answers are the same. What lies beside tables is listed, a folder at once. What a state means is the ledger's to
say: shards that stand alike are judged once.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from array import array
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from pipeline.errors import BrokenTableError
from pipeline.execution.passes import Pass
from pipeline.execution.states import Kind, ShardStates, State
from pipeline.machine import num_cores
from pipeline.storage import tables
from pipeline.storage.listing import ABOUT, list_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]
    Columns = dict[str, Ints]  # equally long; a row for each table

SETTLED = 2 * 10**9  # nanoseconds: a file written later than this before it was read may change within one clock tick
THREADS = 16  # that read stamps: a network file system answers each of them late
MANY = 10_000  # shards, from which on it is worth processes to list their files
CHUNK = 250  # stamps that a thread reads before it is given more
SAID = ("num_rows", "digest", "head")  # by every stamp, besides an "input:FOLDER", "status:STATUS", "beside:FILES"
STAMP = re.compile(
    rb'\{"check":"\w+","digest":"(\w+)","num_rows":(\d+)(?:,"payload":(\{[^}]*\}))?,'
    rb'"recipe":\{"inputs":(\{[^}]*\})(.*),"statuses":(\{[^}]*\})\}',
    re.DOTALL,
)
NUMBER = re.compile(r"\d+(?=\.\w+$)")  # of the shard, in a file's name
MIX = 6364136223846793005  # odd, so that no two numbers become one when they are multiplied by it


class StateIndex:
    """The states of all shards of a plan."""

    def __init__(self, ledger: ShardStates) -> None:
        self._ledger, self._plan, self._passes = ledger, ledger.plan, ledger.passes
        self._kept = ledger.run.folder / ".work" / "stamps"
        self._broken: dict[str, list[int]] = {}
        self.columns = cache(self._columns)
        self._standing = cache(self._stand)
        self._states = cache(self._judge)

    def kinds(self, p: Pass) -> npt.NDArray[np.str_]:
        """The kind of every shard's state, by shard."""
        import numpy as np

        states, alike = self._states(p.folder)
        return np.array([state.kind for state in states])[alike]

    def shards(self, p: Pass, *kinds: Kind) -> list[int]:
        """The shards whose state is one of these."""
        import numpy as np

        states, alike = self._states(p.folder)
        found: list[int] = np.flatnonzero(np.array([state.kind in kinds for state in states])[alike]).tolist()
        return found

    def reasons(self, p: Pass, kind: Kind) -> list[str]:
        """Why shards are of this kind, each reason once."""
        return list(dict.fromkeys(state.why for state in self._states(p.folder)[0] if state.kind == kind))

    def num_rows(self, p: Pass) -> int:
        return int(self.columns(p.folder)["num_rows"].sum())

    def statuses(self, p: Pass) -> dict[str, int]:
        """Status -> rows, over all tables that are there."""
        columns = self.columns(p.folder).items()
        found = {name.removeprefix("status:"): int(rows.sum()) for name, rows in columns if name.startswith("status:")}
        return {status: rows for status, rows in sorted(found.items()) if rows}

    def broken(self, p: Pass) -> list[int]:
        """Shards with a file in their table's place that is no whole table."""
        self.columns(p.folder)
        return self._broken[p.folder]

    def _judge(self, folder: str) -> tuple[list[State], Ints]:
        """The states that there are, and for each shard which of them is its own."""
        import numpy as np

        _, first, alike = np.unique(self._standing(folder), return_index=True, return_inverse=True)
        return [self._ledger.state(self._passes[folder], int(shard)) for shard in first], alike

    def _stand(self, folder: str) -> Ints:
        """For each shard a number that is equal where all is equal that its state depends on."""
        own, reads = self.columns(folder), self._passes[folder].reads
        standing = own["head"]
        for name in reads or ("plan",):
            wanted = self.columns(name)["digest"] if reads else self._plan_digests
            standing = standing * MIX + (own.get(f"input:{name}", 0) == wanted)
        for name in reads:
            standing = standing * MIX + self._standing(name)
        for name in sorted(name for name in own if name.startswith("beside:")):
            standing = standing * MIX + ((own[name] > 0) & (own[name] != self._beside[name]))
        return standing

    @cached_property
    def _tables(self) -> Mapping[str, Columns]:
        """What lies in the folder of each pass."""
        return self._listed({folder: f"{folder}/*.parquet" for folder in self._passes})

    @cached_property
    def _beside(self) -> Mapping[str, Ints]:
        """Of each kind of file that any stamp names, the bytes by shard as they are now; 0 where there is none."""
        names = {name for folder in self._passes for name in self.columns(folder) if name.startswith("beside:")}
        seen = self._listed({name: name.removeprefix("beside:") for name in sorted(names)})
        return {name: self._spread(files)["size"] for name, files in seen.items()}

    def _listed(self, patterns: Mapping[str, str]) -> Mapping[str, Columns]:
        paths = [f"{self._ledger.run.folder}/{pattern}" for pattern in patterns.values()]
        found = list_folders(paths, num_procs=num_cores() if self._plan.num_shards > MANY else 1)
        return dict(zip(patterns, map(_sorted, found), strict=True))

    def _columns(self, folder: str) -> Columns:
        """What the files of a folder are and say, by shard; 0 where there is no table."""
        return self._spread(self._current(folder))

    def _spread(self, known: Columns) -> Columns:
        """The same by shard; 0 where there is nothing."""
        import numpy as np

        num = self._plan.num_shards
        planned = known["shard"] < num
        spread = {name: np.zeros(num, np.int64) for name in known}
        for name, column in known.items():
            spread[name][known["shard"][planned]] = column[planned]
        return spread

    def _current(self, folder: str) -> Columns:
        """The folder's whole tables as they are now, a row each; what was read is kept for the next time."""
        import numpy as np

        seen, kept = self._tables[folder], _load(self._file(folder), (*ABOUT, *SAID))
        self._broken[folder] = []
        if all(np.array_equal(seen[name], kept[name]) for name in ABOUT):
            return kept
        at = np.searchsorted(kept["shard"], seen["shard"])
        at[at == len(kept["shard"])] = 0
        same = np.full(len(at), len(kept["shard"]) > 0)
        if same.any():
            same = np.logical_and.reduce([kept[name][at] == seen[name] for name in ABOUT])
        fresh = np.flatnonzero(~same)
        read = self._read(folder, seen["shard"][fresh])
        now = dict(seen)
        for name in dict.fromkeys((*kept, *(name for said in read if said for name in said))):
            if name not in ABOUT:
                now[name] = np.zeros(len(at), np.int64)
                now[name][same] = kept[name][at[same]] if name in kept else 0
                now[name][fresh] = [said.get(name, 0) if said else 0 for said in read]
        whole = np.ones(len(at), bool)
        whole[fresh] = [said is not None for said in read]
        self._broken[folder] = seen["shard"][~whole].tolist()
        settled = whole & (now["mtime"] < time.time_ns() - SETTLED)
        _keep(self._file(folder), {name: column[settled] for name, column in now.items()})
        return {name: column[whole] for name, column in now.items()}

    def _read(self, folder: str, shards: Ints) -> list[Mapping[str, int] | None]:
        paths = [f"{self._ledger.run.folder / folder}/{shard:05d}.parquet" for shard in shards]
        chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
        with ThreadPoolExecutor(THREADS) as pool:
            return [said for chunk in pool.map(lambda chunk: [*map(_said, chunk)], chunks) for said in chunk]

    def _file(self, folder: str) -> Path:
        return self._kept / f"{folder.replace('/', '.')}.npz"

    @cached_property
    def _plan_digests(self) -> Ints:
        """Of all shards; kept for as long as the plan is the same file."""
        import numpy as np

        about = (self._ledger.run.folder / "plan.parquet").stat()
        now, file = [about.st_mtime_ns, about.st_size, about.st_ino], self._file("plan")
        kept = _load(file, ("plan", "digest"))
        if kept["plan"].tolist() != now:
            kept = {"plan": np.array(now), "digest": np.array([*map(_number, self._plan.digests())], np.int64)}
            if about.st_mtime_ns < time.time_ns() - SETTLED:
                _keep(file, kept)
        return kept["digest"]


def _load(file: Path, names: Iterable[str]) -> Columns:
    """The kept columns, with these among them; empty ones where nothing is kept, or nothing that reads."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as kept:
            columns = {name: kept[name] for name in kept.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        columns = {}
    if columns.keys() >= {*names} and all(column.dtype == np.int64 for column in columns.values()):
        return columns
    return {name: np.empty(0, np.int64) for name in names}


def _keep(file: Path, columns: Columns) -> None:
    import numpy as np

    with (
        suppress(OSError),
        tables.open_atomic(file, durable=False) as out,
    ):  # the run may be read-only
        np.savez(out, **columns)  # type: ignore[arg-type]


def list_folders(patterns: Iterable[str], *, num_procs: int) -> list[array[int]]:
    """`listing` of each, several at once where there may be several processes."""
    if num_procs < 2:
        return [*map(list_files, patterns)]
    with ThreadPoolExecutor(num_procs) as pool:
        return [*pool.map(_elsewhere, patterns)]


def _elsewhere(pattern: str) -> array[int]:
    command = [sys.executable, "-I", "-S", str(Path(list_files.__code__.co_filename)), pattern]
    return array("q", subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _sorted(files: array[int]) -> Columns:
    import numpy as np

    rows = np.array(files, np.int64).reshape(-1, len(ABOUT))
    rows = rows[rows[:, 0].argsort()]
    return {name: np.ascontiguousarray(column) for name, column in zip(ABOUT, rows.T, strict=True)}


def _said(path: str) -> Mapping[str, int] | None:
    """What is kept of a stamp; None when the table is broken or has just gone."""
    try:
        text = tables.read_footer_text(Path(path))
    except (FileNotFoundError, BrokenTableError):
        return None
    found = STAMP.fullmatch(text)
    assert found is not None
    digest, num_rows, payload, inputs, recipe, statuses = found.groups()
    given = json.loads(inputs)
    head = hashlib.sha256(json.dumps(sorted(given)).encode() + recipe).hexdigest()
    said = {"num_rows": int(num_rows), "digest": _number(digest.decode()), "head": _number(head)}
    said |= {f"input:{name}": _number(digest) for name, digest in given.items()}
    beside = json.loads(payload or b"{}").items()
    said |= {f"beside:{NUMBER.sub('*', name)}": num_bytes for name, num_bytes in beside}
    return said | {f"status:{status}": num for status, num in json.loads(statuses).items()}


def _number(digest: str) -> int:
    """Of a hexadecimal digest, as many bits as a column holds."""
    return int(digest[:15], 16)
