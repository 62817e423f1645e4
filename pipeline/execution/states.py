"""Decides what is done, missing or stale: by the stamps of the tables, and the sizes of the files beside them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import BrokenTableError
from pipeline.execution.passes import Pass
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from pipeline.storage.payloads import what_is_lost
from pipeline.storage.plan import Plan

Kind = Literal["done", "missing", "lost", "behind", "stale", "blocked"]
DUE: tuple[Kind, ...] = ("missing", "lost", "behind")  # made unasked


@dataclass(frozen=True, kw_only=True)
class State:
    """Where one shard of one pass stands.

    done: its table is what the run asks for. missing: there is none that is whole. lost: there is one, and a file that
    belongs beside it has gone or was cut. behind: there is one, made without an engine, and its inputs have changed or
    grown: it follows them unasked. stale: other words or inputs decided its rows. blocked: what it reads is missing.
    """

    kind: Kind
    why: str = ""
    stamp: tables.TableFooter | None = None


class ShardStates:
    """The states of a run's tables. A stamp is read once, until `forget`."""

    def __init__(self, run: Run, plan: Plan, passes: Sequence[Pass], *, keep: bool = False) -> None:
        self.run, self.plan, self.keep = run, plan, keep
        self._makers = {p.folder: p for p in passes}
        self._stamps: dict[tuple[str, int], tables.TableFooter | None] = {}
        self._states: dict[tuple[str, int], State] = {}
        self._broken: dict[tuple[str, int], str] = {}  # what is wrong with a file that is as good as missing

    def state(self, p: Pass, shard: int) -> State:
        if (p.folder, shard) not in self._states:
            self._states[p.folder, shard] = self._judge(p, shard)
        return self._states[p.folder, shard]

    def stamp(self, folder: str, shard: int) -> tables.TableFooter | None:
        if (folder, shard) not in self._stamps:
            try:
                self._stamps[folder, shard] = tables.read_stamp(table_path(self.run.folder, folder, shard))
            except BrokenTableError as error:
                self._stamps[folder, shard], self._broken[folder, shard] = None, str(error)
        return self._stamps[folder, shard]

    def recipe(self, p: Pass, shard: int) -> tables.Provenance:
        """What decides the rows of this table now. Every table that it reads must be there."""
        inputs = {} if p.reads else {"plan": self.plan.digest(shard)}
        for folder in p.reads:
            stamp = self.stamp(folder, shard)
            assert stamp is not None
            inputs[folder] = stamp.digest
        return tables.Provenance(stage=p.stage, name=p.name, version=p.version, slice=p.slice, inputs=inputs)

    def forget(self, shard: int) -> None:
        """A table of this shard has changed."""
        for folder in self._makers:
            for cache in (self._stamps, self._states, self._broken):
                cache.pop((folder, shard), None)

    def _judge(self, p: Pass, shard: int) -> State:
        stamp = self.stamp(p.folder, shard)
        if stamp is not None and not self.keep and (words := list(changes(stamp.recipe, p))):
            return State(kind="stale", why="; ".join(words), stamp=stamp)
        reads = {folder: self.state(self._makers[folder], shard) for folder in p.reads}
        for folder, state in reads.items():
            if state.stamp is None:
                why = self._broken.get((folder, shard), f"{folder}/{shard:05d}.parquet is missing")
                return State(kind="blocked", why=why, stamp=stamp)
        for state in reads.values():
            if stamp is None and state.kind == "lost":
                return State(kind="blocked", why=state.why)
        if stamp is None:
            return State(kind="missing", why=self._broken.get((p.folder, shard), ""))
        for folder, state in reads.items():
            if state.kind == "stale":
                return State(kind="stale", why=f"its input {folder} is stale: {state.why}", stamp=stamp)
        if lost := what_is_lost(self.run.folder, stamp):
            return State(kind="lost", why=lost, stamp=stamp)
        for folder, state in reads.items():
            if state.kind not in ("done", "lost"):  # of what is lost, the rows are there
                return State(kind="behind", why=f"its input {folder} is {state.kind}", stamp=stamp)
        return self._compare(p, stamp, self.recipe(p, shard))

    def _compare(self, p: Pass, stamp: tables.TableFooter, wanted: tables.Provenance) -> State:
        if stamp.recipe == wanted:
            return State(kind="done", stamp=stamp)
        if self.keep:
            return State(kind="done", stamp=stamp)
        inputs = ", ".join(sorted({k for k, _ in stamp.recipe.inputs.items() ^ wanted.inputs.items()}))
        if not p.engines:
            return State(kind="behind", why=f"{inputs} changed", stamp=stamp)
        return State(kind="stale", why=f"its input {inputs} changed", stamp=stamp)


def changes(old: tables.Provenance, new: Pass | tables.Provenance) -> Iterator[str]:
    """What a person would say has changed in the words and numbers that decide a table's rows."""
    if old.version != new.version:
        yield f"stage {new.stage} is now version {new.version}, was {old.version}"
    yield from _differences(old.slice, new.slice, "")


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}" if where else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif isinstance(old, str) and isinstance(new, str):
        yield f"{where}: {' '.join(_words(old, new))}"
    else:
        yield f"{where}: {old!r} -> {new!r}"


def _words(old: str, new: str) -> Iterator[str]:
    """Only the words that changed, with one before for the reader's sake."""
    a, b = old.split(), new.split()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            before = f"... {a[i - 1]} " if i else ""
            gone, come = f"[{' '.join(a[i:j])}]", f"[{' '.join(b[k:m])}]"
            yield before + {"insert": f"+{come}", "delete": f"-{gone}"}.get(kind, f"{gone} -> {come}")
    if a == b:
        yield "white space changed"
