"""The states of tables: done, missing or stale, from their footers and the sizes of their payload files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.errors import BrokenTableError
from pipeline.execution.passes import Pass, whole_input
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


@dataclass(frozen=True, kw_only=True)
class WholeTable:
    """The tables of all shards of one pass, as one input of another."""

    digest: str  # over the digests of all of them, hex
    problem: State | None = None  # the state of a table that is made from them; None: all are done


class ShardStates:
    """The states of a run's tables. A footer is read once, until `forget`.

    A table made from all shards counts, for those that read it, as up to date while its configuration and its inputs of
    the same shard are unchanged. Only its own state depends on the other shards.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        passes: Sequence[Pass],
        *,
        keep: bool = False,
        read_whole: Callable[[str], WholeTable] | None = None,
    ) -> None:
        """
        Args:
            keep: whether stale tables count as done.
            read_whole: reads the tables of all shards in a folder; needed for passes that read all shards.
        """
        self.run, self.plan, self.keep, self._read_whole = run, plan, keep, read_whole
        self.passes = {p.folder: p for p in passes}
        self._whole: dict[str, WholeTable] = {}
        self._footers: dict[tuple[str, int], tables.TableFooter | None] = {}
        self._states: dict[tuple[str, int], State] = {}
        self._damage: dict[tuple[str, int], str] = {}  # of files that cannot be read and count as missing

    def state(self, p: Pass, shard: int) -> State:
        state = self.local_state(p, shard)
        for folder in p.reads_all:
            state = self._compare_whole(p, state, folder)
        return state

    def local_state(self, p: Pass, shard: int) -> State:
        """The state as far as it depends on the shard alone."""
        if (p.folder, shard) not in self._states:
            self._states[p.folder, shard] = self._find_state(p, shard)
        return self._states[p.folder, shard]

    def whole(self, folder: str) -> WholeTable:
        """The tables of all shards in a folder; read once, until `forget_whole`."""
        if folder not in self._whole:
            assert self._read_whole is not None
            self._whole[folder] = self._read_whole(folder)
        return self._whole[folder]

    def footer(self, folder: str, shard: int) -> tables.TableFooter | None:
        if (folder, shard) not in self._footers:
            try:
                self._footers[folder, shard] = tables.read_footer(table_path(self.run.folder, folder, shard))
            except BrokenTableError as error:
                self._footers[folder, shard], self._damage[folder, shard] = None, str(error)
        return self._footers[folder, shard]

    def provenance(self, p: Pass, shard: int) -> tables.Provenance:
        """The provenance of this table if it were made now. Every table that it reads must exist."""
        whole = {whole_input(folder): self.whole(folder).digest for folder in p.reads_all}
        inputs = self._digest_inputs(p, shard) | whole
        return tables.Provenance(stage=p.stage, name=p.name, version=p.version, slice=p.slice, inputs=inputs)

    def _digest_inputs(self, p: Pass, shard: int) -> dict[str, str]:
        """The digests of the shard's own inputs as they are now, by name."""
        if not p.reads:
            return {"plan": self.plan.digest(shard)}
        footers = {folder: self.footer(folder, shard) for folder in p.reads}
        assert all(footers.values())
        return {folder: footer.digest for folder, footer in footers.items() if footer}

    def forget(self, shard: int) -> None:
        """Drops what is cached of a shard, because a table of it has changed."""
        for folder in self.passes:
            for cache in (self._footers, self._states, self._damage):
                cache.pop((folder, shard), None)

    def forget_whole(self) -> None:
        """Drops what is cached of tables of all shards, because some have changed."""
        self._whole.clear()

    def _find_state(self, p: Pass, shard: int) -> State:
        footer = self.footer(p.folder, shard)
        if footer is not None and not self.keep and (changes := list(describe_changes(footer.provenance, p))):
            return State(kind="stale", why="; ".join(changes), footer=footer)
        inputs = {folder: self.local_state(self.passes[folder], shard) for folder in p.reads}
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
        return self._compare_inputs(p, footer, shard)

    def _compare_inputs(self, p: Pass, footer: tables.TableFooter, shard: int) -> State:
        made, current = footer.provenance, self._digest_inputs(p, shard)
        own = {name: digest for name, digest in made.inputs.items() if not name.endswith("/*")}
        if self.keep or (own == current and (made.stage, made.name) == (p.stage, p.name)):
            return State(kind="done", footer=footer)
        return _mark_changed(p, footer, sorted({name for name, _ in own.items() ^ current.items()}))

    def _compare_whole(self, p: Pass, state: State, folder: str) -> State:
        """The state of a table, given what it is without the tables of all shards in `folder`, which it reads too."""
        whole, footer = self.whole(folder), state.footer
        if whole.problem and whole.problem.kind == "blocked" and state.kind != "blocked":
            return replace(whole.problem, footer=footer)
        if state.kind != "done" or footer is None:
            return state
        if whole.problem:
            return replace(whole.problem, footer=footer)
        name = whole_input(folder)
        if self.keep or footer.provenance.inputs.get(name) == whole.digest:
            return state
        return _mark_changed(p, footer, [name])


def _mark_changed(p: Pass, footer: tables.TableFooter, names: Sequence[str]) -> State:
    """The state of a table when these of its inputs have changed."""
    if not p.engines:
        return State(kind="behind", why=f"{', '.join(names)} changed", footer=footer)
    return State(kind="stale", why=f"its input {', '.join(names)} changed", footer=footer)


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
    elif _are_pairs(old) and _are_pairs(new) and dict(old) != dict(new):
        yield from _describe_differences(dict(old), dict(new), field)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _describe_differences(a, b, f"{field}[{index}]")
    elif isinstance(old, str) and isinstance(new, str):
        yield f"{field}: {' '.join(_diff_words(old, new))}"
    else:
        yield f"{field}: {old!r} -> {new!r}"


def _are_pairs(value: Any) -> bool:
    """True for a list of names with values, as a mapping is stamped whose order matters."""
    pairs = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
    return pairs and all(isinstance(name, str) for name, _ in value)


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
