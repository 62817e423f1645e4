"""Verification of a whole run: its files against their checksums, and its tables against the plan and each other.

It only reads. What is missing or stale is not damage: `recap status` shows it, and `recap run` makes it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Event

from pipeline import machine
from pipeline.errors import BrokenTableError, MachineError, OutOfMemoryError
from pipeline.execution.exported_files import STRAY, Difference, compare_files
from pipeline.execution.passes import COPIES, AllShards, Pass, Shard
from pipeline.execution.run_state import RunState
from pipeline.execution.shared_work import ensure_shared
from pipeline.execution.strays import find_stray_payload, find_stray_tables
from pipeline.progress import ProgressMeter, say
from pipeline.records import (
    Canary,
    Caption,
    Exported,
    Finding,
    Image,
    ImageRubric,
    Label,
    Record,
    Score,
    Stat,
    Step,
    make_key,
)
from pipeline.sections import Run
from pipeline.storage import integrity, tables
from pipeline.storage.compaction import check_copies
from pipeline.storage.database import STAGES_OF_FOLDERS, find_leftovers
from pipeline.storage.integrity import check_payload_file, check_table
from pipeline.storage.layout import PACKED, table_path
from pipeline.storage.payloads import MISSING, SUMS, hash_file, measure_file, read_sums

LEFTOVERS: Mapping[str, type[Record]] = {  # by the first folder
    "finding": Finding,
    "caption": Caption,
    "rubric": ImageRubric,
    "score": Score,
    "canary": Canary,
}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file and what mends it."""

    path: str  # relative to the run; of an image that stays in the corpus, as its row has it
    reason: str
    remedy: str  # a shell command, or advice where there is none


def check_plan(run: Run) -> Damage | None:
    """Damage of the plan. Without it no table can be compared with anything."""
    path = run.folder / "plan.parquet"
    try:
        integrity.check_plan(path)
    except FileNotFoundError:
        return None  # reading the run says so
    except BrokenTableError as error:
        advice = (
            f"restore it from a copy; if the corpus is unchanged: {_remove(run.folder, path)} && {_recap('plan', run)}"
        )
        return Damage(path=path.name, reason=error.message, remedy=advice)
    return None


class Verification:
    """Reads everything of the selected shards of a run, and with the first shard what belongs to no shard."""

    def __init__(self, state: RunState, meter: ProgressMeter) -> None:
        self.state, self.run, self._meter = state, state.run, meter
        self.num_tables = 0
        self.num_unread = 0  # checks that did not end

    def find_damage(self, shard: int) -> Iterator[Damage]:
        damaged = False  # a table of this shard, or a file beside one
        for p in self.state.passes:
            for damage in self._try(shard, self._check_pass(p, shard, damaged)):
                damaged = True
                yield damage
            yield from self._try(shard, self._check_stats(p.folder, shard, p.name, p.caption, stages=(p.stage, COPIES)))
        for folder in find_leftovers(self.run):
            path, (first, *names) = table_path(self.run.folder, folder, shard), folder.split("/")
            stages = (STAGES_OF_FOLDERS.get(first, first), COPIES)
            yield from self._try(shard, self._check_file(path, LEFTOVERS[first], "", shard=shard))
            yield from self._try(shard, self._check_stats(folder, shard, *names, stages=stages))
        if shard == 0:
            yield from self._try(shard, self._check_whole_run())

    def _try(self, shard: int, check: Iterator[Damage]) -> Iterator[Damage]:
        """A check whose files may be unreadable for a reason that is no damage, such as a failing disk."""
        try:
            yield from check
        except (OSError, MachineError) as error:
            if isinstance(trouble := machine.find_trouble(error), OutOfMemoryError):
                raise trouble from error
            self.num_unread += 1
            say(f"recap: shard {shard:05d} was not read to its end: {error}")

    def _check_pass(self, p: Pass, shard: int, damaged: bool) -> Iterator[Damage]:
        path, command = table_path(self.run.folder, p.folder, shard), _recap(f"run {p.title} --shard {shard}", self.run)
        broken = [*self._check_file(path, p.record, command, shard=shard)]
        yield from broken
        footer = None if broken else tables.read_footer(path)
        if footer is None:
            return
        reasons = {name: check_payload_file(self.run.folder, name, footer) for name in footer.payload}
        damages = {name: (reason, name) for name, reason in reasons.items() if reason}
        damages |= {name: (reason, cause) for name, reason, cause in self._compare_images(p, shard, reasons)}
        for name, (reason, cause) in damages.items():
            if cause:
                yield Damage(path=name, reason=reason, remedy=f"{self._remove(self.run.folder / cause)} && {command}")
            else:
                yield self._describe(self.run.folder / name, reason, "")
        for name, reason in self._check_corpus(p, shard):
            remedy = f"restore it; or, to go on with the corpus as it is now: {self._remove(path)} && {command}"
            yield Damage(path=name, reason=reason, remedy=remedy)
        sound = not damaged and not damages  # views of SQL read more tables than those of the pass
        if sound and (reason := self._compare_rows(p, shard, footer)):
            yield self._describe(path, reason, command)

    def _check_stats(
        self, folder: str, shard: int, name: str, caption: str = "", *, stages: tuple[str, ...]
    ) -> Iterator[Damage]:
        """Verifies the statistics of a table; `stages` are those that may have made it."""
        path = table_path(self.run.folder / "stats", folder, shard)
        if damages := [*self._check_file(path, Stat, "")]:
            yield from damages
        elif path.exists():
            ids, expected = [row.id for row in tables.read_rows(path, Stat)], [(name, caption, shard)]
            if [one[1:] for one in ids] != expected or ids[0][0] not in stages:
                yield self._describe(path, f"has rows of other tables than {folder}/{path.name}: {ids}", "")

    def _check_file(
        self, path: Path, record: type[Record], command: str, *, shard: int | None = None
    ) -> Iterator[Damage]:
        """Verifies a table, if there is one; the keys of its rows must be of `shard`, if it is given."""
        try:
            footer = check_table(path, record, shard=shard)
        except FileNotFoundError:
            return
        except BrokenTableError as error:
            yield self._describe(path, error.message, command)
        else:
            self._meter.add(footer.num_rows, 0)
        self.num_tables += 1

    def _compare_images(self, p: Pass, shard: int, reasons: Mapping[str, str]) -> Iterator[Difference]:
        """Compares packed or exported images with the digests in their rows.

        Args:
            reasons: payload file -> damage that is known, whose files are not compared; "": none.
        """
        names = [name for name, reason in reasons.items() if not reason]
        rows = self._shard(shard).read_table(p.folder, p.record)
        if issubclass(p.record, Exported):
            digests = {row.key: row.written_sha256 or row.sha256 for row in rows if isinstance(row, Exported)}
            damaged = {Path(name).parts[1] for name in reasons.keys() - names}
            own = self.run.sections["export"][""].formats
            yield from compare_files(self.run.folder, own, names, digests, damaged)
        elif issubclass(p.record, Image):
            with closing(self._shard(shard)) as images:
                for row in (row for row in rows if isinstance(row, Image) and row.file in names):
                    try:
                        images.read_image(row)
                    except BrokenTableError as error:
                        yield row.file or "", error.message, row.file or ""

    def _check_corpus(self, p: Pass, shard: int) -> Iterator[tuple[str, str]]:
        """Reads the images that stay in the corpus; yields the files that have changed or are gone, each once."""
        if not issubclass(p.record, Image):
            return
        seen: set[str] = set()
        with closing(self._shard(shard)) as images:
            for row in images.read_table(p.folder, Image):
                if row.file is None or not Path(row.file).is_absolute() or row.file in seen:
                    continue
                try:
                    images.read_image(row)
                except OSError as error:
                    seen.add(row.file)
                    yield row.file, f"cannot be read: {error.strerror}" if error.errno else "has changed since ingest"

    def _compare_rows(self, p: Pass, shard: int, footer: tables.TableFooter) -> str:
        """Compares the rows of an up-to-date table with the inputs that they are made from; "" if they agree."""
        if not p.reads and footer.provenance.inputs.get("plan") != self.state.plan.digest(shard):
            return "was made from other files than plan.parquet names"
        if self.state.states.state(p, shard).kind != "done":
            return ""
        ids = (row.id for row in self._shard(shard).read_table(p.folder, p.record))
        if not p.reads:
            planned = self.state.plan.num_samples(shard)
            num = footer.num_rows if planned is None else planned
            return _compare_ids(ids, ((make_key(shard, index),) for index in range(num)))
        try:
            with closing(self._shard(shard, p)) as inputs:
                return _compare_ids(ids, (item.id for item in p.inputs(inputs)))
        except (MachineError, RuntimeError) as error:
            if isinstance(trouble := machine.find_trouble(error), OutOfMemoryError):
                raise trouble from error
            return f"does not fit its inputs: {error}"

    def _check_whole_run(self) -> Iterator[Damage]:
        folder = self.run.folder
        for path in sorted((folder / "step").glob("*.parquet")):
            yield from self._check_file(path, Step, "")
        for path in sorted((folder / "label").glob("*.parquet")):
            yield from self._check_file(path, Label, "")
        shards = range(self.state.plan.num_shards)
        folders = {p.folder for p in self.state.passes} | {*find_leftovers(self.run)}
        strays = [*find_stray_tables(folder, folders, num_shards=len(shards))]
        for p in self.state.passes:
            if p.whole_files or (p.folder == "image" and (folder / PACKED).is_dir()):
                footers = [tables.read_whole_footer(table_path(folder, p.folder, shard)) for shard in shards]
                strays += find_stray_payload(self.run, p, footers)
                yield from self._check_sums(p, footers)
        for path in strays:
            yield self._describe(path, STRAY, "")
        for copy, reason in check_copies(folder):
            yield self._describe(copy, reason, _recap("compact", self.run))

    def _check_sums(self, p: Pass, footers: Collection[tables.TableFooter | None]) -> Iterator[Damage]:
        """Compares the list of an export's digests with the files that belong to no shard, and with the footers."""
        folder, sums = self.run.folder, self.run.folder / p.folder / SUMS
        whole = {name: measure_file(folder / name)[1] for name in p.whole_files}
        whole = {name: problem for name, problem in whole.items() if problem != MISSING}
        problem = measure_file(sums)[1]
        if problem == MISSING:
            return
        paths = [*(folder / name for name in p.whole_files), sums]
        remedy = f"{self._remove(*paths)} && {_recap(f'run {p.title}', self.run)}"
        recorded = {name: digest for footer in footers if footer for name, digest in footer.payload_sha256.items()}
        try:
            listed = read_sums(folder, p.folder) if not problem else {}
            unlike = sorted(name for name, digest in recorded.items() if listed.get(name) != digest)
            unlike += sorted({*whole} - {*listed})
            reason = f"does not have the digest of {unlike[0]}" if unlike and not problem else problem
        except ValueError as error:
            listed, reason = {}, str(error)
        if reason:
            yield Damage(path=str(sums.relative_to(folder)), reason=reason, remedy=remedy)
            return
        changed = {
            name: why or f"has changed since it was written: its SHA-256 is not that in {p.folder}/{SUMS}"
            for name, why in whole.items()
            if why or listed[name] != hash_file(folder / name)
        }
        if None not in footers:  # otherwise the export is not finished, nor is its list
            lost = (name for name in sorted({*listed} - {*recorded}) if measure_file(folder / name)[1] == MISSING)
            changed |= dict.fromkeys(lost, f"is missing: {p.folder}/{SUMS} lists it")
        for name, why in changed.items():
            yield Damage(path=name, reason=why, remedy=remedy)
        if (
            len(changed) == 1 and not any(whole.values()) and whole.keys() >= changed.keys()
        ):  # which of the two was damaged, nothing tells
            reason = f"does not have the digest of {next(iter(changed))}: one of the two has changed"
            yield Damage(path=str(sums.relative_to(folder)), reason=reason, remedy=remedy)

    def _describe(self, path: Path, reason: str, command: str) -> Damage:
        remedy = f"{self._remove(path)} && {command}" if command else self._remove(path)
        return Damage(path=str(path.relative_to(self.run.folder)), reason=reason, remedy=remedy)

    def _remove(self, *paths: Path) -> str:
        return _remove(self.run.folder, *paths)

    def _shard(self, number: int, p: Pass | None = None) -> Shard:
        shard = Shard(run=self.run, number=number, pieces=self.state.plan.pieces(number))
        if p and p.prepare:
            shards = AllShards(run=self.run, num_shards=self.state.plan.num_shards, stop=Event())
            shard.ensure_shared = partial(ensure_shared, p, shards, self.state.states.provenance(p, number))
        return shard


def _compare_ids(rows: Iterable[tuple[str | int, ...]], expected: Iterable[tuple[str | int, ...]]) -> str:
    for row, other in zip_longest(rows, expected):
        if row is None:
            return f"has no row {other}"
        if row != other:
            return f"has a row {row} where its inputs give " + ("none" if other is None else str(other))
    return ""


def _remove(run: Path, *paths: Path) -> str:
    """The command that removes files, or whatever has their place or that of their directory."""
    found = [next((one for one in path.parents if one.is_file() and one.is_relative_to(run)), path) for path in paths]
    command = "rm -rf" if any(path.is_dir() and not path.is_symlink() for path in found) else "rm -f"
    return " ".join([command, *map(_quote, dict.fromkeys(found))])


def _recap(command: str, run: Run) -> str:
    return f"recap {command} --run {_quote(run.folder)}"


def _quote(path: Path) -> str:
    """A path as a shell word on one line."""
    text = str(path)
    return shlex.quote(text) if text.isprintable() else "$'" + "".join(f"\\x{b:02x}" for b in os.fsencode(path)) + "'"
