"""Labels: what people say of captions, read from files into the table `label`, and combined into one verdict each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.progress import escape_controls
from pipeline.records import Label
from pipeline.sections import Run
from pipeline.storage import database, tables
from pipeline.storage.payloads import hash_file

FOLDER = "label"
WHOLE_CAPTION = {"acceptable", "unacceptable", "unsure"}
SENTENCE = {"true", "false", "unsure"}
Identity = tuple[str, str, int]  # key, pass, candidate


def import_labels(run: Run, file: Path) -> int:
    """Reads a file of labels into the run's table `label`; a file that was read before changes nothing.

    Args:
        file: what the page of `recap audit` saves, JSONL with one label a line, or Parquet with the columns of `Label`;
            `sentence`, `labeller`, `at` and `text` may be missing.

    Returns:
        The number of labels in the file.

    Raises:
        UserError: the file cannot be read, or a label does not name a caption of this run.
    """
    try:
        rows = list(_read_file(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as labels (JSON, JSONL or Parquet): {error}") from error
    texts = _read_texts(run, {str(row.get("key")) for row in rows})
    labels = [_parse_label(row, texts, where=f"{file}, label {number}") for number, row in enumerate(rows, 1)]
    labels = list({label.id: label for label in labels}.values())  # the last of a labeller counts
    name = hash_file(file)[:16]
    provenance = tables.Provenance(stage="audit", name="", version=1, slice={}, inputs={})
    path = run.folder / FOLDER / f"{name}.parquet"
    tables.write_rows(path, Label, sorted(labels, key=lambda label: label.id), provenance)
    return len(labels)


def read_labels(run: Run) -> list[Label]:
    return [
        label for path in sorted((run.folder / FOLDER).glob("*.parquet")) for label in tables.read_rows(path, Label)
    ]


@dataclass(frozen=True, kw_only=True)
class CaptionVerdict:
    """The verdict of all labellers together on a caption."""

    votes: Mapping[str, bool]  # labeller -> acceptable

    @property
    def is_acceptable(self) -> bool | None:
        """The majority; None where votes are equal."""
        num = sum(self.votes.values())
        return None if 2 * num == len(self.votes) else 2 * num > len(self.votes)

    @property
    def is_disputed(self) -> bool:
        return len(set(self.votes.values())) > 1


def combine_labels(labels: Iterable[Label]) -> dict[Identity, CaptionVerdict]:
    """A verdict for each caption. A labeller's word on the whole caption counts; without it, a false sentence makes the
    caption unacceptable, and sentences that are all true make it acceptable."""
    by_caption: dict[Identity, dict[str, list[Label]]] = {}
    for label in labels:
        groups = by_caption.setdefault((label.key, label.caption, label.candidate), {})
        groups.setdefault(label.labeller, []).append(label)
    votes = {
        identity: {who: vote for who, some in groups.items() if (vote := _find_vote(some)) is not None}
        for identity, groups in by_caption.items()
    }
    return {identity: CaptionVerdict(votes=some) for identity, some in votes.items() if some}


def _find_vote(labels: Sequence[Label]) -> bool | None:
    whole = [label.verdict for label in labels if label.sentence is None and label.verdict != "unsure"]
    if whole:
        return whole[-1] == "acceptable"
    sentences = [label.verdict for label in labels if label.sentence is not None]
    if "false" in sentences:
        return False
    return True if sentences and set(sentences) == {"true"} else None


def measure_agreement(verdicts: Iterable[CaptionVerdict]) -> dict[tuple[str, str], tuple[float, int]]:
    """Cohen's kappa of each pair of labellers, with the number of captions that both labelled (Cohen 1960)."""
    pairs: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for verdict in verdicts:
        for a, b in combinations(sorted(verdict.votes), 2):
            pairs.setdefault((a, b), []).append((verdict.votes[a], verdict.votes[b]))
    return {pair: (_cohen_kappa(votes), len(votes)) for pair, votes in pairs.items()}


def _cohen_kappa(votes: Sequence[tuple[bool, bool]]) -> float:
    num = len(votes)
    observed = sum(a == b for a, b in votes) / num
    first, second = (sum(column) / num for column in zip(*votes, strict=True))
    expected = first * second + (1 - first) * (1 - second)
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(verdicts: Iterable[CaptionVerdict]) -> float | None:
    """The agreement of several labellers over the captions that have two votes or more (Fleiss 1971).

    Captions may have different numbers of votes. None: no caption has two.
    """
    several = [list(verdict.votes.values()) for verdict in verdicts if len(verdict.votes) > 1]
    if not several:
        return None
    agreed = [sum(n * (n - 1) for n in Counter(votes).values()) / (len(votes) * (len(votes) - 1)) for votes in several]
    share = sum(map(sum, several)) / sum(map(len, several))
    observed, expected = sum(agreed) / len(agreed), share**2 + (1 - share) ** 2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def _read_file(file: Path) -> Iterator[Mapping[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(file).to_pylist()
        return
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = content.get("labels", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of labels")
    yield from rows


def _read_texts(run: Run, keys: Iterable[str]) -> dict[Identity, str]:
    """The captions of these keys."""
    listed = ", ".join(map(database.quote_literal, sorted(keys))) or "NULL"
    with database.connect_run(run) as connection:
        rows = database.query_rows(
            connection, f"SELECT key, name, candidate, text FROM caption WHERE key IN ({listed})"
        )
        return {(key, name, candidate): text for key, name, candidate, text in rows}


def _parse_label(row: Mapping[str, Any], texts: Mapping[Identity, str], *, where: str) -> Label:
    """
    Raises:
        UserError: a field is missing or wrong; the message names it and its value.
    """
    key, caption, candidate = row.get("key"), row.get("caption"), row.get("candidate", 0)
    shown = escape_controls(str(key)[:40], keep="")
    if not isinstance(key, str) or not isinstance(caption, str) or type(candidate) is not int:
        raise UserError(f"{where}: needs key (text), caption (the pass, text) and candidate (a number); key is {shown}")
    if (key, caption, candidate) not in texts:
        raise UserError(f"{where}: caption {caption} {candidate} of key {shown} is not in this run")
    sentence, verdict = row.get("sentence"), row.get("verdict")
    if sentence is not None and (type(sentence) is not int or sentence < 0):
        raise UserError(f"{where}: sentence is {str(sentence)[:40]!r}; it must be a number from 0, or null")
    allowed = WHOLE_CAPTION if sentence is None else SENTENCE
    if verdict not in allowed:
        raise UserError(f"{where}: verdict is {str(verdict)[:40]!r}; it must be one of {', '.join(sorted(allowed))}")
    return Label(
        key=key,
        caption=caption,
        candidate=candidate,
        sentence=sentence,
        verdict=verdict,
        labeller=str(row.get("labeller") or "anonymous"),
        at=str(row.get("at") or ""),
        text=str(row.get("text") or texts[key, caption, candidate]),
    )
