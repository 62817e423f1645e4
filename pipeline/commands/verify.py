"""The lines of `recap verify`: each damaged file of a run, with the command that mends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pipeline.errors import MachineError, StoppedError
from pipeline.execution.run_state import RunState
from pipeline.execution.signals import stop_on_signal
from pipeline.execution.verification import Damage, Verification, check_plan
from pipeline.progress import ProgressMeter, escape_controls, format_quantity, say
from pipeline.sections import Run


def verify_run(run: Run, *, shards: str) -> Iterator[str]:
    """Reads everything of the shards that a spec names; yields a line for each damaged file.

    Raises:
        RefusedError, SpecError: there is no plan, or it lacks a shard.
        MachineError: some files cannot be read, for another reason than damage; all others were.
        StoppedError: a signal came.
    """
    if damage := check_plan(run):
        yield _format_damage(damage)
        say("recap: nothing else was read: the plan decides what the tables should hold")
        return
    state, stop, num_damaged = RunState(run, shards=shards), threading.Event(), 0
    with stop_on_signal(stop), ProgressMeter("verify", num_shards=len(state.selected), num_rows=None) as meter:
        verification = Verification(state, meter)
        for shard in state.selected:
            for damage in verification.find_damage(shard):
                num_damaged += 1
                yield _format_damage(damage)
            state.states.forget(shard)
            meter.shard_done()
            if stop.is_set():
                raise StoppedError
    if verification.num_unread:
        raise MachineError("not all files could be read, for reasons that are no damage: see above; run it again")
    num_tables, shards = verification.num_tables, format_quantity(len(state.selected), "shard")
    say(f"{format_quantity(num_tables, 'table')} of {shards} read, {format_quantity(num_damaged, 'file')} damaged")


def _format_damage(damage: Damage) -> str:
    reason = " ".join(damage.reason.split())
    return escape_controls(f"{damage.path} {reason}; to mend it: {damage.remedy}", keep="")
