"""The states of tables: done, missing or stale, from their footers and the sizes of their payload files."""

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
from pipeline.storage.payloads import find_damage
from pipeline.storage.plan import Plan

Kind = Literal["done", "missing", "incomplete", "behind", "stale", "blocked"]
DUE: tuple[Kind, ...] = ("missing", "incomplete", "behind")  # made again without --stale redo


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of one shard of one pass.

    done: the table is up to date. missing: there is no whole table. incomplete: there is one, but a payload file is
    missing or truncated. behind: the inputs of a pass without engines have changed or grown; it is cheap, so it follows
    them. stale: run.toml or the inputs of a pass with engines have changed. blocked: a table that it reads is missing.
    """

    kind: Kind
    why: str = ""
    footer: tables.TableFooter | None = None


class ShardStates:
    """The states of a run's tables. A footer is read once, until `forget`."""

    def __init__(self, run: Run, plan: Plan, passes: Sequence[Pass], *, keep: bool = False) -> None:
        """
        Args:
            keep: whether stale tables count as done.
        """
        self.run, self.plan, self.keep = run, plan, keep
        self.passes = {p.folder: p for p in passes}
        self._footers: dict[tuple[str, int], tables.TableFooter | None] = {}
        self._states: dict[tuple[str, int], State] = {}
        self._damage: dict[tuple[str, int], str] = {}  # of files that do not read and count as missing

    def state(self, p: Pass, shard: int) -> State:
        if (p.folder, shard) not in self._states:
            self._states[p.folder, shard] = self._find_state(p, shard)
        return self._states[p.folder, shard]

    def footer(self, folder: str, shard: int) -> tables.TableFooter | None:
        if (folder, shard) not in self._footers:
            try:
                self._footers[folder, shard] = tables.read_footer(table_path(self.run.folder, folder, shard))
            except BrokenTableError as error:
                self._footers[folder, shard], self._damage[folder, shard] = None, str(error)
        return self._footers[folder, shard]

    def provenance(self, p: Pass, shard: int) -> tables.Provenance:
        """The provenance of this table if it were made now. Every table that it reads must exist."""
        inputs = {} if p.reads else {"plan": self.plan.digest(shard)}
        for folder in p.reads:
            footer = self.footer(folder, shard)
            assert footer is not None
            inputs[folder] = footer.digest
        return tables.Provenance(stage=p.stage, name=p.name, version=p.version, slice=p.slice, inputs=inputs)

    def forget(self, shard: int) -> None:
        """Drops what is cached of a shard, because a table of it has changed."""
        for folder in self.passes:
            for cache in (self._footers, self._states, self._damage):
                cache.pop((folder, shard), None)

    def _find_state(self, p: Pass, shard: int) -> State:
        footer = self.footer(p.folder, shard)
        if footer is not None and not self.keep and (changes := list(describe_changes(footer.provenance, p))):
            return State(kind="stale", why="; ".join(changes), footer=footer)
        inputs = {folder: self.state(self.passes[folder], shard) for folder in p.reads}
        for folder, state in inputs.items():
            if state.footer is None:
                why = self._damage.get((folder, shard), f"{folder}/{shard:05d}.parquet is missing")
                return State(kind="blocked", why=why, footer=footer)
        for state in inputs.values():
            if footer is None and state.kind == "incomplete":
                return State(kind="blocked", why=state.why)
        if footer is None:
            return State(kind="missing", why=self._damage.get((p.folder, shard), ""))
        for folder, state in inputs.items():
            if state.kind == "stale":
                return State(kind="stale", why=f"its input {folder} is stale: {state.why}", footer=footer)
        if damage := find_damage(self.run.folder, footer):
            return State(kind="incomplete", why=damage, footer=footer)
        for folder, state in inputs.items():
            if state.kind not in ("done", "incomplete"):  # of an incomplete input, the rows are there
                return State(kind="behind", why=f"its input {folder} is {state.kind}", footer=footer)
        return self._compare_inputs(p, footer, self.provenance(p, shard))

    def _compare_inputs(self, p: Pass, footer: tables.TableFooter, current: tables.Provenance) -> State:
        if self.keep or footer.provenance == current:
            return State(kind="done", footer=footer)
        changed = ", ".join(sorted({k for k, _ in footer.provenance.inputs.items() ^ current.inputs.items()}))
        if not p.engines:
            return State(kind="behind", why=f"{changed} changed", footer=footer)
        return State(kind="stale", why=f"its input {changed} changed", footer=footer)


def describe_changes(old: tables.Provenance, new: Pass | tables.Provenance) -> Iterator[str]:
    """The differences in stage version and configuration, one by one, in words."""
    if old.version != new.version:
        yield f"stage {new.stage} is now version {new.version}, was {old.version}"
    yield from _describe_differences(old.slice, new.slice, "")


def _describe_differences(old: Any, new: Any, field: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _describe_differences(old.get(name), new.get(name), f"{field}.{name}" if field else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _describe_differences(a, b, f"{field}[{index}]")
    elif isinstance(old, str) and isinstance(new, str):
        yield f"{field}: {' '.join(_diff_words(old, new))}"
    else:
        yield f"{field}: {old!r} -> {new!r}"


def _diff_words(old: str, new: str) -> Iterator[str]:
    """The words that changed, each group after the word before it."""
    a, b = old.split(), new.split()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            before = f"... {a[i - 1]} " if i else ""
            removed, added = f"[{' '.join(a[i:j])}]", f"[{' '.join(b[k:m])}]"
            yield before + {"insert": f"+{added}", "delete": f"-{removed}"}.get(kind, f"{removed} -> {added}")
    if a == b:
        yield "white space changed"
