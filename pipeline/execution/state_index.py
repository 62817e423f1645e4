"""The states of a whole run in seconds, from cached footers.

Footers are cached as columns in .work/stamps; a table whose name, time, size and inode are unchanged is not read again.
Without the cache the answers are the same. Payload files are listed, one folder at a time. `ShardStates` decides what a
state means, once for all shards whose files and inputs are alike.
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
from pipeline.execution.passes import Pass, whole_input
from pipeline.execution.states import Kind, ShardStates, State, WholeTable
from pipeline.machine import num_cores
from pipeline.storage import tables
from pipeline.storage.listing import FILE_COLUMNS, list_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]
    Columns = dict[str, Ints]  # of equal length; a row for each file or shard

SETTLED = 2 * 10**9  # nanoseconds: a file read sooner after its time than this may change within the same clock tick
THREADS = 16  # that read footers: a network file system has a long latency
MANY = 10_000  # shards from which processes list folders faster
CHUNK = 250  # footers that a thread reads at a time
FOOTER_COLUMNS = ("num_rows", "digest", "head")  # of every footer; others: input:FOLDER, status:STATUS, beside:FILES
FOOTER = re.compile(
    rb'\{"check":"\w+","digest":"(\w+)","num_rows":(\d+)(?:,"payload":(\{[^}]*\}))?,'
    rb'(?:"payload_sha256":\{[^}]*\},)?"recipe":\{"inputs":(\{[^}]*\})(.*),"statuses":(\{[^}]*\})\}',
    re.DOTALL,
)
NUMBER = re.compile(r"\d+(?=\.\w+$)")  # the shard's, in a file name
MIX = 6364136223846793005  # odd, so that multiplication maps no two numbers to one


class StateIndex:
    """The states of all shards of a plan."""

    def __init__(self, states: ShardStates) -> None:
        self._shard_states, self._plan, self._passes = states, states.plan, states.passes
        self._cache_folder = states.run.folder / ".work" / "stamps"
        self._broken: dict[str, list[int]] = {}
        self.columns = cache(self._columns_by_shard)
        self._fingerprints = cache(self._compute_fingerprints)
        self._states = cache(self._find_states)

    def kinds(self, p: Pass) -> npt.NDArray[np.str_]:
        """The kind of every shard's state, indexed by shard."""
        import numpy as np

        states, which = self._states(p.folder)
        return np.array([state.kind for state in states])[which]

    def shards(self, p: Pass, *kinds: Kind) -> list[int]:
        """The shards whose state is of one of these kinds."""
        import numpy as np

        states, which = self._states(p.folder)
        shards: list[int] = np.flatnonzero(np.array([state.kind in kinds for state in states])[which]).tolist()
        return shards

    def reasons(self, p: Pass, kind: Kind) -> list[str]:
        """The distinct reasons of states of this kind."""
        return list(dict.fromkeys(state.why for state in self._states(p.folder)[0] if state.kind == kind))

    def num_rows(self, p: Pass) -> int:
        return int(self.columns(p.folder)["num_rows"].sum())

    def statuses(self, p: Pass) -> dict[str, int]:
        """Status -> rows, over all tables of the pass."""
        columns = self.columns(p.folder).items()
        totals = {name.removeprefix("status:"): int(rows.sum()) for name, rows in columns if name.startswith("status:")}
        return {status: total for status, total in sorted(totals.items()) if total}

    def broken(self, p: Pass) -> list[int]:
        """The shards whose table file is damaged."""
        self.columns(p.folder)
        return self._broken[p.folder]

    def whole(self, folder: str) -> WholeTable:
        """The tables of all shards in a folder, as one input."""
        import numpy as np

        _, first, which = np.unique(self._fingerprints(folder), return_index=True, return_inverse=True)
        states = [self._shard_states.local_state(self._passes[folder], int(shard)) for shard in first]
        digests = self.columns(folder)["digest"].astype("<i8").tobytes()
        missing = np.flatnonzero(np.array([state.footer is None for state in states], bool)[which])
        if len(missing):
            number = f"{len(missing)} of {len(which)} tables of {folder}/ that it reads"
            why = f"{number} are missing, {folder}/{missing[0]:05d}.parquet the first"
            return WholeTable(digest="", problem=State(kind="blocked", why=why))
        kinds = {state.kind: state for state in reversed(states) if state.kind not in ("done", "incomplete")}
        problem = None
        if kinds:
            state = kinds.get("stale") or next(iter(kinds.values()))
            kind: Kind = "stale" if state.kind == "stale" else "behind"
            problem = State(kind=kind, why=f"its input {folder} is {state.kind}: {state.why}")
        return WholeTable(digest=hashlib.sha256(digests).hexdigest(), problem=problem)

    def _find_states(self, folder: str) -> tuple[list[State], Ints]:
        """The distinct states, and for each shard the index of its own."""
        import numpy as np

        p, own, fingerprints = self._passes[folder], self.columns(folder), self._fingerprints(folder)
        for name in p.reads_all:
            current = _parse_digest(self._shard_states.whole(name).digest)
            fingerprints = fingerprints * MIX + (own.get(f"input:{whole_input(name)}", 0) == current)
        _, first, which = np.unique(fingerprints, return_index=True, return_inverse=True)
        return [self._shard_states.state(p, int(shard)) for shard in first], which

    def _compute_fingerprints(self, folder: str) -> Ints:
        """For each shard a number; shards whose local state depends on equal facts have equal numbers."""
        own, reads = self.columns(folder), self._passes[folder].reads
        fingerprints = own["head"]
        for name in reads or ("plan",):
            current = self.columns(name)["digest"] if reads else self._plan_digests
            fingerprints = fingerprints * MIX + (own.get(f"input:{name}", 0) == current)
        for name in reads:
            fingerprints = fingerprints * MIX + self._fingerprints(name)
        for name in sorted(name for name in own if name.startswith("beside:")):
            fingerprints = fingerprints * MIX + ((own[name] > 0) & (own[name] != self._payload_sizes[name]))
        return fingerprints

    @cached_property
    def _tables(self) -> Mapping[str, Columns]:
        """The table files of each pass."""
        return self._list_files({folder: f"{folder}/*.parquet" for folder in self._passes})

    @cached_property
    def _payload_sizes(self) -> Mapping[str, Ints]:
        """The current sizes of each kind of payload file, by shard; 0 where there is none."""
        names = {name for folder in self._passes for name in self.columns(folder) if name.startswith("beside:")}
        files = self._list_files({name: name.removeprefix("beside:") for name in sorted(names)})
        return {name: self._spread_by_shard(columns)["size"] for name, columns in files.items()}

    def _list_files(self, patterns: Mapping[str, str]) -> Mapping[str, Columns]:
        paths = [f"{self._shard_states.run.folder}/{pattern}" for pattern in patterns.values()]
        files = list_folders(paths, num_procs=num_cores() if self._plan.num_shards > MANY else 1)
        return dict(zip(patterns, map(_sort_files, files), strict=True))

    def _columns_by_shard(self, folder: str) -> Columns:
        """File and footer columns of a folder, indexed by shard; 0 where there is no table."""
        return self._spread_by_shard(self._read_current(folder))

    def _spread_by_shard(self, columns: Columns) -> Columns:
        """Columns indexed by shard instead of by file; 0 where there is no file."""
        import numpy as np

        num = self._plan.num_shards
        planned = columns["shard"] < num
        spread = {name: np.zeros(num, np.int64) for name in columns}
        for name, column in columns.items():
            spread[name][columns["shard"][planned]] = column[planned]
        return spread

    def _read_current(self, folder: str) -> Columns:
        """File and footer columns of the folder's whole tables, a row each; reads changed footers and caches all."""
        import numpy as np

        files, cached = self._tables[folder], _load_columns(self._cache_file(folder), (*FILE_COLUMNS, *FOOTER_COLUMNS))
        self._broken[folder] = []
        if all(np.array_equal(files[name], cached[name]) for name in FILE_COLUMNS):
            return cached
        at = np.searchsorted(cached["shard"], files["shard"])
        at[at == len(cached["shard"])] = 0
        same = np.full(len(at), len(cached["shard"]) > 0)
        if same.any():
            same = np.logical_and.reduce([cached[name][at] == files[name] for name in FILE_COLUMNS])
        changed = np.flatnonzero(~same)
        footers = self._read_footers(folder, files["shard"][changed])
        current = dict(files)
        for name in dict.fromkeys((*cached, *(name for footer in footers if footer for name in footer))):
            if name not in FILE_COLUMNS:
                current[name] = np.zeros(len(at), np.int64)
                current[name][same] = cached[name][at[same]] if name in cached else 0
                current[name][changed] = [footer.get(name, 0) if footer else 0 for footer in footers]
        whole = np.ones(len(at), bool)
        whole[changed] = [footer is not None for footer in footers]
        self._broken[folder] = files["shard"][~whole].tolist()
        settled = whole & (current["mtime"] < time.time_ns() - SETTLED)
        _save_columns(self._cache_file(folder), {name: column[settled] for name, column in current.items()})
        return {name: column[whole] for name, column in current.items()}

    def _read_footers(self, folder: str, shards: Ints) -> list[Mapping[str, int] | None]:
        paths = [f"{self._shard_states.run.folder / folder}/{shard:05d}.parquet" for shard in shards]
        chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
        with ThreadPoolExecutor(THREADS) as pool:
            footers = pool.map(lambda chunk: [*map(_read_footer_columns, chunk)], chunks)
            return [footer for chunk in footers for footer in chunk]

    def _cache_file(self, folder: str) -> Path:
        return self._cache_folder / f"{folder.replace('/', '.')}.npz"

    @cached_property
    def _plan_digests(self) -> Ints:
        """The plan's digests of all shards; cached while the plan file is unchanged."""
        import numpy as np

        stat = (self._shard_states.run.folder / "plan.parquet").stat()
        identity, file = [stat.st_mtime_ns, stat.st_size, stat.st_ino], self._cache_file("plan")
        columns = _load_columns(file, ("plan", "digest"))
        if columns["plan"].tolist() != identity:
            digests = [*map(_parse_digest, self._plan.digests())]
            columns = {"plan": np.array(identity), "digest": np.array(digests, np.int64)}
            if stat.st_mtime_ns < time.time_ns() - SETTLED:
                _save_columns(file, columns)
        return columns["digest"]


def _load_columns(file: Path, names: Iterable[str]) -> Columns:
    """Cached columns, with at least these names; empty columns if there is no cache, or a damaged one."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        columns = {}
    if columns.keys() >= {*names} and all(column.dtype == np.int64 for column in columns.values()):
        return columns
    return {name: np.empty(0, np.int64) for name in names}


def _save_columns(file: Path, columns: Columns) -> None:
    import numpy as np

    with suppress(OSError), tables.open_atomic(file, durable=False) as out:  # the run may be read-only
        np.savez(out, **columns)  # type: ignore[arg-type]


def list_folders(patterns: Iterable[str], *, num_procs: int) -> list[array[int]]:
    """`list_files` of each pattern, in parallel processes if `num_procs` is more than one."""
    if num_procs < 2:
        return [*map(list_files, patterns)]
    with ThreadPoolExecutor(num_procs) as pool:
        return [*pool.map(_list_in_process, patterns)]


def _list_in_process(pattern: str) -> array[int]:
    command = [sys.executable, "-I", "-S", str(Path(list_files.__code__.co_filename)), pattern]
    return array("q", subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _sort_files(files: array[int]) -> Columns:
    import numpy as np

    rows = np.array(files, np.int64).reshape(-1, len(FILE_COLUMNS))
    rows = rows[rows[:, 0].argsort()]
    return {name: np.ascontiguousarray(column) for name, column in zip(FILE_COLUMNS, rows.T, strict=True)}


def _read_footer_columns(path: str) -> Mapping[str, int] | None:
    """The columns of a table's footer; None if the table is damaged or was removed since it was listed."""
    try:
        text = tables.read_footer_text(Path(path))
    except (FileNotFoundError, BrokenTableError):
        return None
    match = FOOTER.fullmatch(text)
    assert match is not None
    digest, num_rows, payload, inputs, rest, statuses = match.groups()
    digests = json.loads(inputs)
    head = hashlib.sha256(json.dumps(sorted(digests)).encode() + rest).hexdigest()  # of what decides rows but inputs
    columns = {"num_rows": int(num_rows), "digest": _parse_digest(digest.decode()), "head": _parse_digest(head)}
    columns |= {f"input:{name}": _parse_digest(digest) for name, digest in digests.items()}
    sizes = json.loads(payload or b"{}").items()
    columns |= {f"beside:{NUMBER.sub('*', name)}": num_bytes for name, num_bytes in sizes}
    return columns | {f"status:{status}": num for status, num in json.loads(statuses).items()}


def _parse_digest(digest: str) -> int:
    """As many bits of a hexadecimal digest as a column holds."""
    return int(digest[:15] or "0", 16)
