"""The health of a run's judges, from its canary tables: in lines of plain words, or as an error.

Does not decide what is healthy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import JudgeError
from pipeline.progress import format_quantity
from pipeline.records import Canary, Caption, Record, Score
from pipeline.sections import Run
from pipeline.storage import plan, tables
from pipeline.storage.layout import table_path
from pipeline.storage.sentences import split_sentences
from pipeline.storage.words import count_words
from stages.audit import drift
from stages.audit.drift import Drift
from stages.audit.health import Health, RatedCopy, examine_judge
from stages.scorers._samples import ScorePass, list_score_passes

MAX_SHARDS = 100  # whose tables are read; of more, an even choice that depends on the plan alone
SENTENCE = re.compile(r"/(\d+)$")  # the number of a sentence, from 1, ends the id of a criterion about it


@dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """A judge on one caption pass, as its canaries show it."""

    name: str
    caption: str
    health: Health
    drifts: Mapping[str, Drift]  # kind of error -> of its detection over the shards
    shards: Sequence[int]  # that have copies

    @property
    def e_value(self) -> float:
        """The evidence that detection has changed over the shards."""
        return drift.mean_e_value(list(self.drifts.values()))


def describe_judges(run: Run) -> Iterator[str]:
    """Lines on each judge and caption pass that has canaries; the first names them."""
    for p in list_score_passes(run):
        if (report := read_report(run, p)) is not None:
            yield f"judge {p.name} of {p.caption}: {_summarise(report)}"
            yield from (f"  {line}" for line in _list_details(report))


def _summarise(report: JudgeReport) -> str:
    alarms = [finding.text for finding in report.health.findings if finding.is_alarm]
    measured = f"{format_quantity(report.health.num_captions, 'caption')} with spoiled copies"
    if alarms:
        return f"BAD by {measured}: {alarms[0]}"
    if not any(one.is_known for one in report.health.detections):
        return f"unknown: {measured} are too few"
    return f"no fault found by {measured}"


def _list_details(report: JudgeReport) -> Iterator[str]:
    alarms = [finding.text for finding in report.health.findings if finding.is_alarm]
    yield from alarms[1:]
    yield from (f"note: {finding.text}" for finding in report.health.findings if finding.cause == "unasked")
    if report.e_value >= drift.ALARM:
        kind, most = max(report.drifts.items(), key=lambda item: item[1].e_value)
        shard = report.shards[most.change]
        yield (
            f"drift: {most.before:.0%} of errors of the kind {kind} are noticed before shard {shard}, {most.after:.0%} "
            f"from there on (e-value {report.e_value:.3g}; {drift.ALARM:.0f} is an alarm)"
        )
    elif len(report.shards) > 1:
        yield f"no drift over {len(report.shards)} shards (e-value {report.e_value:.2g}; {drift.ALARM:.0f} is an alarm)"


def check_detection(run: Run, p: ScorePass, *, minimum: float) -> None:
    """
    Raises:
        JudgeError: a judge notices significantly less than the minimum of a kind of error that its rubric asks about,
            or fails on many calls.
    """
    report = read_report(run, p)
    if report is None:
        return
    faults = [finding.text for finding in report.health.findings if finding.cause in ("failures", "always no")]
    faults += [
        f"notices {one.share:.2f} of planted errors of the kind {one.kind} (J = {one.difference:.2f})"
        for one in report.health.list_below(minimum, unasked=p.scorer.unasked)
    ]
    if faults:
        raise JudgeError(
            f"{run.file}: score.{p.name}.min_detection = {minimum}: the judge of {p.caption} {'; '.join(faults)}. "
            "Choose another judge or rubric, let its rubric name in `unasked` what it does not ask about, or lower "
            f"min_detection; `recap query canaries --run {shlex.quote(str(run.folder))}` shows all kinds"
        )


def read_report(run: Run, p: ScorePass) -> JudgeReport | None:
    """The health of a judge on a caption pass, from a sample of shards; None without canaries.

    Raises:
        BrokenTableError: a table is damaged.
    """
    copies: list[RatedCopy] = []
    for shard in choose_shards(run):
        with suppress(FileNotFoundError):  # shards that are not made yet
            copies += _read_copies(run, p, shard)
    if not copies:
        return None
    shards = sorted({copy.shard for copy in copies})
    return JudgeReport(
        name=p.name,
        caption=p.caption,
        health=examine_judge(copies, unasked=p.scorer.unasked),
        drifts=dict(_measure_drifts(copies, shards)),
        shards=shards,
    )


def choose_shards(run: Run) -> range:
    path = run.folder / "plan.parquet"
    num_shards = plan.count_shards(path) if path.exists() else 0
    return range(0, num_shards, -(-num_shards // MAX_SHARDS) or 1)


def _measure_drifts(copies: Iterable[RatedCopy], shards: Sequence[int]) -> Iterator[tuple[str, Drift]]:
    """By kind of error; of each image one copy counts, since its captions are not independent."""
    noticed: dict[str, dict[tuple[int, str], bool]] = {}
    for copy in copies:
        if copy.is_judged:
            image = copy.caption.partition("/")[0]
            noticed.setdefault(copy.kind, {}).setdefault((copy.shard, image), copy.sign > 0)
    for kind, by_image in sorted(noticed.items()):
        counts = {shard: [0, 0] for shard in shards}
        for (shard, _), is_noticed in by_image.items():
            counts[shard][0] += 1
            counts[shard][1] += is_noticed
        yield kind, drift.measure_drift([(num, hits) for num, hits in counts.values()])


def _read_copies(run: Run, p: ScorePass, shard: int) -> Iterator[RatedCopy]:
    """The ratings of a shard's spoiled copies and their originals; nothing while the originals have no scores.

    Raises:
        FileNotFoundError: a table is not made yet.
    """
    rated = ("key", "candidate", "value", "criteria")
    path = table_path(run.folder, f"canary/{p.name}/{p.caption}", shard)
    spoiled = list(_read_rows(path, Canary, (*rated, "kind", "text")))
    keys = {row["key"] for row in spoiled}
    path = table_path(run.folder, f"score/{p.name}/{p.caption}", shard)
    scores = {(row["key"], row["candidate"]): row for row in _read_rows(path, Score, rated, keys=keys)}
    path = table_path(run.folder, f"caption/{p.caption}", shard)
    texts = {
        (row["key"], row["candidate"]): row["text"]
        for row in _read_rows(path, Caption, ("key", "candidate", "text"), keys=keys)
    }
    for row in spoiled:
        identity = (row["key"], row["candidate"])
        original = scores.get(identity)
        if original is None:
            continue
        text = texts.get(identity, "")
        yield RatedCopy(
            kind=row["kind"],
            caption=f"{row['key']}/{row['candidate']}",
            shard=shard,
            candidate=row["candidate"],
            original=original["value"],
            copy=row["value"],
            accepted=_find_accepted(text, row["text"], original),
            num_words=(count_words(text), count_words(row["text"])),
            sentences=tuple(_list_sentence_values(row).values()),
        )


def _read_rows(
    path: Path, record: type[Record], columns: Sequence[str], *, keys: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a table with these columns, of all images or of some."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not path.exists():
        raise FileNotFoundError(path)
    for batch in tables.read_batches(path, record, columns=columns):
        if keys is not None:
            batch = batch.filter(pc.is_in(batch.column("key"), value_set=pa.array(sorted(keys), pa.string())))
        yield from batch.to_pylist()


def _list_sentence_values(row: Mapping[str, Any]) -> dict[int, float | None]:
    """The lowest value of the criteria about each sentence, by its number; empty if captions are judged as a whole."""
    values: dict[int, list[float | None]] = {}
    for criterion in row["criteria"]:
        if (match := SENTENCE.search(criterion["id"])) is not None:
            values.setdefault(int(match[1]), []).append(criterion["value"])
    known = {number: [one for one in of_one if one is not None] for number, of_one in values.items()}
    return {number: min(of_one, default=None) for number, of_one in sorted(known.items())}


def _find_accepted(text: str, spoiled: str, original: Mapping[str, Any]) -> float | None:
    """The judge's value of the sentences that a copy has otherwise; None unless they are judged by themselves."""
    values = _list_sentence_values(original)
    before, after = split_sentences(text), split_sentences(spoiled)
    if not values or len(before) != len(after):
        return None
    changed = [number for number, (old, new) in enumerate(zip(before, after, strict=True), start=1) if old != new]
    return min((value for number in changed if (value := values.get(number)) is not None), default=None)
