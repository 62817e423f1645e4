"""`recap check`: finds what would stop a run, in one line each, before the first hour of it.

A quick check opens no model; `recap run` begins with it. The whole check also sends a few pictures through every pass.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

from pipeline import config
from pipeline.commands import push
from pipeline.errors import EngineDiedError, MachineError, UserError
from pipeline.execution import sample
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.passes import Pass
from pipeline.execution.run_state import RunState
from pipeline.progress import format_bytes, say
from pipeline.records import Piece, Raw, status_of
from pipeline.sections import Run
from pipeline.slurm import limits, scheduler
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from pipeline.storage.plan import explain_shard_size

NUM_PICTURES = 4  # that go through every pass
NUM_FIRST = 20  # samples of a piece among which one must have an image
MIN_FREE = 200 * 10**6  # bytes: with less, the next tables and part files would not fit
LONGEST_WAIT = 10.0  # seconds for the answer of a store or of the Hub
SPARE_FILES = 256  # handles besides the connections to servers
Kind = Literal["fine", "wrong", "doubtful"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check, in one line.

    fine: nothing to do. wrong: the run would fail. doubtful: it would fail as things are now, but may work later, as
    with a server that is still starting.
    """

    kind: Kind
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind:8}  {self.where}: {' '.join(self.message.split())}"


def check_run(folder: Path) -> Iterator[Finding]:
    """Every check, the cheap ones first; pictures are sent only when those found nothing."""
    try:
        state = RunState(config.load(folder))
        passes = select_passes(state.passes, "all")
    except (UserError, MachineError, OSError) as error:
        message = str(error).removeprefix(f"{(folder / 'run.toml').absolute()}: ")
        yield Finding(kind="wrong", where="run.toml", message=message)
        return
    findings = [*check_quickly(state, passes), *_check_slurm(state.run, passes)]
    yield from findings
    if all(finding.kind == "fine" for finding in findings):
        yield from _send_pictures(state)


def require_ready(state: RunState, passes: Sequence[Pass]) -> None:
    """The quick check of the passes that a command is about to make; says what is doubtful.

    Raises:
        UserError: something is wrong.
    """
    unfinished = [p for p in passes if p.folder not in state.finished]
    due = [p for p in unfinished if any(state.states.state(p, shard).kind != "done" for shard in state.selected)]
    findings = list(check_quickly(state, due)) if due else [*_check_shard_size(state)]
    for finding in findings:
        if finding.kind == "doubtful":
            say(f"recap: {finding.where}: {finding.message}")
    if wrong := [f"{finding.where}: {finding.message}" for finding in findings if finding.kind == "wrong"]:
        raise UserError("\n".join([*wrong, "(recap run --no-check starts all the same)"]))


def check_quickly(state: RunState, passes: Sequence[Pass]) -> Iterator[Finding]:
    """The checks that load no model and send no picture."""
    yield from _check_shard_size(state)
    if any(not p.reads for p in passes):
        yield _check_source(state)
    for name in dict.fromkeys(name for p in passes for name in p.engines):
        yield _check_engine(state.run, name, [p for p in passes if name in p.engines])
    yield from _check_settings(passes)
    if any(p.stage == "export" for p in passes) and (target := state.run.sections["export"][""].url):
        yield _check_target(target, where=f"{state.run.file}: export.url")
    yield _check_disk(state)
    yield _check_handles(state.run, passes)


def _check_shard_size(state: RunState) -> Iterator[Finding]:
    if changed := explain_shard_size(state.run.folder / "plan.parquet", state.run.corpus.shard_size):
        yield Finding(kind="wrong", where=str(state.run.file), message=changed)


def _check_source(state: RunState) -> Finding:
    """Reads a few random images of the plan; none that would be downloaded."""
    run, where = state.run, f"{state.run.file}: source"
    shards = state.selected[:: max(1, len(state.selected) // NUM_PICTURES)][:NUM_PICTURES]
    pieces = [piece for shard in shards for piece in state.plan.pieces(shard)]
    if not pieces:
        message = f"plan.parquet holds no images; correct the source and run `recap plan --run {run.folder}`"
        return Finding(kind="wrong", where=where, message=message)
    local = [piece for piece in pieces if "://" not in piece.file]
    if not local:
        return Finding(kind="fine", where=where, message="is remote and not read")
    try:
        drawn = sample.draw_pieces(
            local, NUM_PICTURES, random=Random(run.seed), counter=sample.SampleCounter(run.source)
        )
        ends = {piece.file: piece.stop for piece in local}  # a failed download is followed by others
        onwards = [dataclasses.replace(piece, stop=ends[piece.file]) for piece in drawn]
        raws = [raw for piece in onwards if (raw := _read_sample(run, piece))]
    except (OSError, ValueError) as error:
        message = f"cannot be read: {error}; are its disks mounted, and may you read them?"
        return Finding(kind="wrong", where=where, message=message)
    lost = [f"{raw.source_key}: {raw.error}" for raw in raws if raw.data is None]
    if lost and len(lost) == len(raws):
        message = f"none of {len(raws)} random images can be read, e.g. {lost[0]}; have they moved, may you read them?"
        return Finding(kind="wrong" if len(raws) >= NUM_PICTURES else "doubtful", where=where, message=message)
    message = f"{state.plan.num_shards} shards planned; {len(raws) - len(lost)} of {len(raws)} random images read"
    return Finding(kind="fine", where=where, message=message)


def _read_sample(run: Run, piece: Piece) -> Raw | None:
    """The first sample of a piece that has data, among its first few, or the last of these; None if it is empty."""
    raw = None
    for raw in islice(run.source.module.read(piece, run.source.config), NUM_FIRST):
        if raw.data is not None:
            break
    return raw


def _check_engine(run: Run, name: str, passes: Sequence[Pass]) -> Finding:
    """Inspects an engine, without opening it, for the passes that use it."""
    plugin = run.engines[name]
    inspect = getattr(plugin.module, "inspect", None)
    if inspect is None:
        return Finding(kind="fine", where=plugin.where, message=f"kind {plugin.kind!r} needs no check")
    try:
        found = inspect(plugin.config)
    except UserError as error:
        return Finding(kind="wrong", where=plugin.where, message=str(error))
    except EngineDiedError as error:
        return Finding(kind="doubtful", where=plugin.where, message=str(error))
    shown = [p.title for p in passes if p.shows_images and name not in p.blind_engines]
    if shown and found.takes_images is False:
        message = f"{found.summary}, but takes no images, and {shown[0]} shows it some; name a vision-language model"
        return Finding(kind="wrong", where=plugin.where, message=message)
    longest = max(passes, key=lambda p: _find_max_tokens(p.slice))
    if found.context and (num := _find_max_tokens(longest.slice)) >= found.context:
        message = (
            f"its context of {found.context} tokens holds no prompt beside the {num} tokens that {longest.title} may"
            " answer (max_tokens); raise max_model_len, or lower max_tokens"
        )
        return Finding(kind="doubtful", where=plugin.where, message=message)
    return Finding(kind="fine", where=plugin.where, message=found.summary)


def _check_settings(passes: Sequence[Pass]) -> Iterator[Finding]:
    """What passes themselves look up beforehand, such as a tokenizer."""
    for p in (p for p in passes if p.check):
        finding = _call_in_time(p.check, where=p.title) if p.check else None
        if finding and finding.kind != "fine":
            yield finding


def _check_target(target: str, *, where: str) -> Finding:
    """Looks at where `recap run all` uploads the export to, in the end."""
    return _call_in_time(partial(push.check_target, target), where=where)


def _call_in_time(check: Callable[[], None], *, where: str) -> Finding:
    """The result of a check that asks another machine, which may never answer."""
    found: list[Finding] = []

    def call() -> None:
        try:
            check()
            found.append(Finding(kind="fine", where=where, message="answers"))
        except UserError as error:
            found.append(Finding(kind="wrong", where=where, message=str(error)))
        except (MachineError, OSError) as error:
            found.append(Finding(kind="doubtful", where=where, message=str(error)))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LONGEST_WAIT)
    waited = f"no answer within {LONGEST_WAIT:.0f} s; is the network reachable from here?"
    return found[0] if found else Finding(kind="doubtful", where=where, message=waited)


def _find_max_tokens(value: Any) -> int:
    """The largest `max_tokens` anywhere in a part of a fingerprint; 0 without one."""
    if isinstance(value, Mapping):
        own = value.get("max_tokens")
        return max([own if isinstance(own, int) else 0, *map(_find_max_tokens, value.values())])
    return max(map(_find_max_tokens, value), default=0) if isinstance(value, list | tuple) else 0


def _check_disk(state: RunState) -> Finding:
    """Compares the disk's free bytes and files with the least that a run needs."""
    folder, num_tables = state.run.folder, 2 * len(state.passes) * len(state.selected)  # a table and its statistics
    free, status = shutil.disk_usage(folder).free, os.statvfs(folder)
    if free < MIN_FREE:
        message = f"the disk has {format_bytes(free)} left; free some, or move the run to another one"
    elif status.f_files and status.f_favail < num_tables:
        message = f"the disk has room for {status.f_favail} files, fewer than the {num_tables} tables of the run"
    else:
        return Finding(kind="fine", where=str(folder), message=f"{format_bytes(free)} are free")
    return Finding(kind="wrong", where=str(folder), message=message)


def _check_handles(run: Run, passes: Sequence[Pass]) -> Finding:
    """Compares the limit of open files with the connections to servers."""
    engines = {name: run.engines[name].config for p in passes for name in p.engines}
    num = SPARE_FILES + sum(getattr(engine, "max_in_flight", 0) for engine in engines.values())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < num:
        message = f"{limit} may be open, and {num} may be needed; run `ulimit -n {num}` first, or lower max_in_flight"
        return Finding(kind="wrong", where="open files", message=message)
    return Finding(kind="fine", where="open files", message=f"{num} at most, {limit} allowed")


def _check_slurm(run: Run, passes: Sequence[Pass]) -> Iterator[Finding]:
    """Compares what `[slurm]` requests with the partitions, where both exist."""
    if not (scheduler.is_installed() and limits.is_configured(run.slurm)):
        return
    where = f"{run.file}: slurm"
    try:
        excesses = list(limits.find_excesses(run.slurm, dict.fromkeys(p.stage for p in passes)))
    except (UserError, MachineError) as error:
        yield Finding(kind="doubtful", where=where, message=str(error))
        return
    for key, message in excesses:
        yield Finding(kind="wrong", where=f"{where}.{key}", message=message)
    if not excesses:
        yield Finding(kind="fine", where=where, message="its partitions grant what is requested")


def _send_pictures(state: RunState) -> Iterator[Finding]:
    """Sends a few random images of the plan through every pass, in a temporary directory."""
    run = state.run
    with sample.open_folder(run) as copy:
        try:
            counter = sample.SampleCounter(run.source)
            pieces = sample.read_pieces(run)
            drawn = sample.draw_pieces(pieces, NUM_PICTURES, random=Random(run.seed), counter=counter)
            probe = sample.plan_sample(copy, [drawn])
            for timing in sample.make_passes(probe, select_passes(probe.passes, "all")):
                yield _judge_rows(copy.folder, timing.p)
        except (UserError, MachineError, OSError) as error:
            yield Finding(kind="wrong", where=str(run.file), message=f"pictures do not pass: {error}")


def _judge_rows(folder: Path, p: Pass) -> Finding:
    """A pass that reads the corpus or asks an engine is wrong when all rows that it made failed."""
    rows = list(tables.read_rows(table_path(folder, p.folder, 0), p.record))
    failed = [row for row in rows if status_of(row) in p.record.failed]
    if rows and len(failed) == len(rows) and (p.engines or not p.reads):
        error = getattr(failed[0], "error", None) or "without a message"
        message = f"all {len(rows)} rows of {NUM_PICTURES} random images fail, e.g. {status_of(failed[0])}: {error}"
        return Finding(kind="wrong", where=p.title, message=message)
    counts = f"{len(rows)} rows of {NUM_PICTURES} random images"
    return Finding(kind="fine", where=p.title, message=f"{counts}, {len(failed)} failed" if failed else counts)
