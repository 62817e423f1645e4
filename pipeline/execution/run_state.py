"""The state of a run: its passes, its plan, and which tables are done, missing or stale.

Everything here only reads. pipeline/execution/runner.py makes what is missing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from pipeline.errors import RefusedError
from pipeline.execution.pass_graph import add_inputs, list_passes
from pipeline.execution.passes import Pass
from pipeline.execution.state_index import StateIndex
from pipeline.execution.states import ShardStates, WholeTable
from pipeline.progress import format_quantity
from pipeline.sections import Run
from pipeline.storage.plan import Plan

Stale = Literal["stop", "redo", "keep"]  # --stale: refuse to run, make stale tables again, or use them as they are
MAX_REASONS = 10  # in one message
MANY = 100  # shards from which their states are found at once, with a cache of footers in the run's folder


@dataclass
class RunState:
    """The passes, plan and table states of one run."""

    run: Run
    _: KW_ONLY
    shards: str = "all"  # a spec, as --shard takes it
    stale: Stale = "stop"

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError, RefusedError, SpecError: passes do not fit together, there is no plan, or it lacks a shard.
        """
        self.passes = list_passes(self.run)
        path = self.run.folder / "plan.parquet"
        if not path.exists():
            raise RefusedError(f"{path} is missing; `recap plan --run {self.run.folder}` makes it")
        self.plan, self.selected = Plan.load(path, self.shards)
        self.states = self._open_states(self.plan, self.passes)
        self._finished: frozenset[str] | None = None

    def _open_states(self, plan: Plan, passes: Sequence[Pass]) -> ShardStates:
        return ShardStates(self.run, plan, passes, keep=self.stale == "keep", read_whole=self._read_whole)

    def _read_whole(self, folder: str) -> WholeTable:
        """The tables of all shards in a folder, also of those that are not selected."""
        plan, _ = Plan.load(self.run.folder / "plan.parquet")
        passes = add_inputs(self.passes, [p for p in self.passes if p.folder == folder])
        return StateIndex(self._open_states(plan, passes)).whole(folder)

    @property
    def finished(self) -> frozenset[str]:
        """The folders whose tables are all done; empty unless all of many shards are selected, and after `forget`.

        It is found for all shards at once, from cached footers, and not shard by shard (benchmarks/rerun.py).
        """
        if self._finished is None:
            index, num = StateIndex(self.states), self.plan.num_shards
            done = (p.folder for p in self.passes if len(index.shards(p, "done")) == num)
            self._finished = frozenset(done if MANY <= num == len(self.selected) else ())
        return self._finished

    def forget(self, shard: int) -> None:
        """Drops what is known of a shard, because a table of it has changed."""
        self.states.forget(shard)
        self._finished = frozenset()

    def check_not_stale(self, passes: Sequence[Pass]) -> None:
        """Refuses to make a run whose tables come partly from an older run.toml.

        Raises:
            RefusedError: a selected shard is stale and `stale` is "stop".
        """
        if self.stale != "stop":
            return
        unfinished = [p for p in passes if p.folder not in self.finished]
        states = [(p, self.states.state(p, shard)) for p in unfinished for shard in self.selected]
        stale = [(p, state) for p, state in states if state.kind == "stale"]
        if stale:
            counts = Counter(p.title for p, _ in stale)
            total = ", ".join(f"{title} ({format_quantity(num, 'shard')})" for title, num in counts.items())
            reasons = list(dict.fromkeys(f"  {p.title}: {state.why}" for p, state in stale))[:MAX_REASONS]
            choices = "use --stale redo to make them again, --stale keep to use them as they are"
            raise RefusedError("\n".join([f"stale: {total}", *reasons, choices]))

    def check_done(self, folders: Iterable[str]) -> None:
        """Checks that every selected shard of these tables is there and up to date.

        Raises:
            RefusedError: one is not, and `stale` is not "keep".
        """
        if self.stale == "keep":
            return
        for p in (p for p in self.passes if p.folder in folders):
            states = {shard: self.states.state(p, shard) for shard in self.selected}
            due = {shard: state for shard, state in states.items() if state.kind != "done"}
            if due:
                shard, state = next(iter(due.items()))
                redo = " --stale redo" if any(state.kind == "stale" for state in due.values()) else ""
                raise RefusedError(
                    f"{p.title}: {len(due)} of {len(states)} shards are not up to date with {self.run.file}; the first"
                    f" is {shard:05d}, {state.kind}{f': {state.why}' if state.why else ''}; make them with"
                    f" `recap run {p.title}{redo} --run {self.run.folder}`, or use what there is with --stale keep"
                )

    def is_complete(self, p: Pass) -> bool:
        """True if every shard of the plan has its table, up to date or not."""
        folder = self.run.folder / p.folder
        num = sum(entry.name.endswith(".parquet") for entry in os.scandir(folder)) if folder.is_dir() else 0
        return num == self.plan.num_shards

    def count_rows(self, p: Pass, shards: Sequence[int]) -> int | None:
        """The rows that these shards will have, for a progress bar; None where only reading the corpus would show."""
        if p.reads_all:
            return None
        if not p.reads:
            counts = [self.plan.num_samples(shard) for shard in shards]
            return None if None in counts else sum(count or 0 for count in counts)
        footers = [self.states.footer(p.reads[-1], shard) for shard in shards]
        usable = sum(footer.statuses.get("ok", footer.num_rows) for footer in footers if footer)
        return usable * int(p.slice.get("num_candidates", 1))
