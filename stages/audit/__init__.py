"""The audit of a run: people label a few captions, and the share of acceptable ones among all is estimated from them.

`recap audit` draws captions and writes a page to label them on; with labels, it prints the precision of what is kept,
what was refused wrongly, and on request a threshold with a guarantee.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.progress import format_quantity
from pipeline.records import Label
from pipeline.sections import Run
from pipeline.storage import database
from pipeline.storage.layout import CERTIFICATE
from pipeline.storage.sentences import split_sentences
from stages.audit.canaries import describe_judges as describe_judges
from stages.audit.certificates import describe_certificate as describe_certificate
from stages.audit.certificates import write_certificate
from stages.audit.drawing import MAX_POPULATION, POPULATIONS, DrawnCaption, Population, draw_captions
from stages.audit.intervals import Share, estimate_share
from stages.audit.labels import combine_labels, fleiss_kappa, import_labels, measure_agreement, read_labels
from stages.audit.page import write_page
from stages.audit.thresholds import find_threshold
from stages.text.repetition import split_words

if TYPE_CHECKING:
    import numpy as np

NUM_DRAWN = 200  # captions of a first draw
KEPT_SHARE = 0.5  # of the captions that are drawn; the others are refused ones


def run_command(
    run: Run,
    *,
    draw: int | None,
    labels: Sequence[Path],
    precision: float | None,
    confidence: float,
    score: str | None,
    seed: int,
) -> Iterator[str]:
    """The lines of `recap audit`: labels are added first, then captions are drawn or estimates made.

    Raises:
        UserError: a file cannot be read, there is nothing to draw from or to estimate from, or an option is wrong.
    """
    if precision is not None:
        _check_score(run, score)  # before anything is labelled for it
    for file in labels:
        yield f"{file}: {format_quantity(import_labels(run, file), 'label')}"
    if draw is None and not read_labels(run):
        draw = NUM_DRAWN
    if draw is not None:
        path = draw_page(run, num_captions=draw, seed=seed)
        yield f"{path}: open it in a browser, label the captions and save them to a file"
        threshold = (
            "" if precision is None else f" --precision {precision:g} --confidence {confidence:g} --score {score}"
        )
        yield f"next: recap audit --labels FILE{threshold} --run {shlex.quote(str(run.folder))}"
        return
    if precision is None or score is None:
        yield from describe_audit(run, seed=seed)
        return
    yield from describe_guarantee(run, score=score, precision=precision, confidence=confidence, seed=seed)


def draw_page(run: Run, *, num_captions: int, seed: int) -> Path:
    """Draws captions, half of them kept and half refused, and writes the page to label them on.

    Raises:
        UserError: the run has no verdicts yet.
    """
    half = round(KEPT_SHARE * num_captions)
    sizes: dict[Population, int] = {"kept": half, "refused": num_captions - half}
    with database.connect_run(run) as connection:
        drawn = [list(draw_captions(connection, name, seed=seed, limit=size)) for name, size in sizes.items()]
    captions = [caption for pair in zip_longest(*drawn) for caption in pair if caption is not None]
    if not captions:
        raise UserError(f"{run.folder}: has no verdicts to audit; `recap run filter --run {run.folder}` makes them")
    # Kept and refused alternate in the draw; the order of keys does not show which is which.
    return write_page(run, sorted(captions, key=lambda caption: (caption.key[::-1], caption.id)))


@dataclass(frozen=True, kw_only=True)
class PopulationAudit:
    """A population with the labels of its captions."""

    population: Population
    size: int  # captions
    captions: Sequence[DrawnCaption]  # an even draw, whose features are known
    verdicts: Mapping[int, bool]  # place in `captions` -> acceptable

    def estimate(self, *, confidence: float = 0.95) -> Share:
        features, places = build_features(self.captions), sorted(self.verdicts)
        labels = [self.verdicts[place] for place in places]
        return estimate_share(labels, features[places], features, size=self.size, confidence=confidence)


def read_audit(run: Run, *, seed: int) -> tuple[list[Label], list[PopulationAudit]]:
    """The labels of a run and, for each population, those of captions that still read as they were labelled."""
    labels = read_labels(run)
    by_caption: dict[tuple[str, str, int], list[Label]] = {}
    for label in labels:
        by_caption.setdefault((label.key, label.caption, label.candidate), []).append(label)
    audits = []
    with database.connect_run(run) as connection:
        for population in POPULATIONS:
            captions = list(draw_captions(connection, population, seed=seed, limit=MAX_POPULATION))
            current = [
                label for caption in captions for label in by_caption.get(caption.id, ()) if label.text == caption.text
            ]
            verdicts = combine_labels(current)
            decided = {
                place: verdict.is_acceptable
                for place, caption in enumerate(captions)
                if (verdict := verdicts.get(caption.id)) and verdict.is_acceptable is not None
            }
            size = captions[0].size if captions else 0
            audits.append(PopulationAudit(population=population, size=size, captions=captions, verdicts=decided))
    return labels, audits


def build_features(captions: Sequence[DrawnCaption]) -> np.ndarray:
    """The features of captions, (n, d)."""
    import numpy as np

    names = sorted({score.name for caption in captions for score in caption.scores})
    return np.array([list(_list_features(caption, names)) for caption in captions], dtype=float)


def _list_features(caption: DrawnCaption, names: Sequence[str]) -> Iterator[float]:
    """Numbers that tell acceptable captions from others: by score pass, its value and its worst criterion; the numbers
    of sentences, of repeated sentences, and of words."""
    scores = {score.name: score for score in caption.scores}
    for name in names:
        score = scores.get(name)
        yield 0.5 if score is None or score.value is None else score.value
        yield 0.5 if score is None or score.worst is None else score.worst
    sentences = [sentence.casefold() for sentence in split_sentences(caption.text)]
    yield from (len(sentences), len(sentences) - len(set(sentences)), len(split_words(caption.text)))


def describe_audit(run: Run, *, seed: int) -> Iterator[str]:
    """Lines on the labels, on the precision of what is kept and on what was refused wrongly.

    Raises:
        UserError: there are no labels.
    """
    labels, audits = read_audit(run, seed=seed)
    if not labels:
        raise UserError(f"{run.folder}: has no labels; `recap audit --draw 200 --run {run.folder}` draws captions")
    yield from _describe_labellers(labels)
    num_used = sum(len(audit.verdicts) for audit in audits)
    num_labelled = len(combine_labels(labels))
    if num_labelled > num_used:
        unused = format_quantity(num_labelled - num_used, "labelled caption")
        yield f"{unused} not counted: the votes are equal, the text has changed, or it is neither kept nor refused now"
    for audit in audits:
        yield from _describe_population(audit)


def _describe_labellers(labels: Sequence[Label]) -> Iterator[str]:
    verdicts = combine_labels(labels)
    num_people = format_quantity(len({label.labeller for label in labels}), "labeller")
    yield f"{format_quantity(len(verdicts), 'caption')} labelled by {num_people}"
    agreement = measure_agreement(verdicts.values())
    for (a, b), (kappa, num) in agreement.items():
        yield f"  {a} and {b} agree with kappa {kappa:.2f} on {format_quantity(num, 'caption')}"
    if len(agreement) > 1:
        yield f"  all of them: Fleiss' kappa {fleiss_kappa(verdicts.values()):.2f}"
    for identity, verdict in verdicts.items():
        if verdict.is_disputed:
            votes = ", ".join(f"{who}: {'acceptable' if vote else 'not'}" for who, vote in verdict.votes.items())
            yield f"  disputed: {' '.join(map(str, identity))} ({votes})"


def _describe_population(audit: PopulationAudit) -> Iterator[str]:
    num, size = len(audit.verdicts), format_quantity(audit.size, f"{audit.population} caption")
    if not num:
        yield f"{size}: none labelled"
        return
    share = audit.estimate()
    interval = f"{share.value:.1%} acceptable, 95 % interval {share.low:.1%} to {share.high:.1%}"
    yield f"{size}: {interval} ({num} labels{'' if share.method == 'labels' else ', with the help of scores'})"
    if audit.population == "refused":
        low, high = (round(bound * audit.size) for bound in (share.low, share.high))
        yield f"  so {low:,} to {high:,} acceptable captions were thrown away"


def describe_guarantee(run: Run, *, score: str, precision: float, confidence: float, seed: int) -> Iterator[str]:
    """Lines on the most lenient threshold of a score that holds a precision, with the line for run.toml.

    Candidates are all captions with this score, kept and refused ones in their true proportion. The certificate of the
    run is replaced, or removed if there is no such threshold.

    Raises:
        UserError: there is no such score, there are no labels, or scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise UserError("recap audit --precision needs scipy: pip install '.[audit]' in a clone of recap")
    _check_score(run, score)
    labels, audits = read_audit(run, seed=seed)
    if not labels:
        raise UserError(f"{run.folder}: has no labels; `recap audit --draw 200 --run {run.folder}` draws captions")
    scores, labelled = collect_scores(audits, score)
    if not scores:
        raise UserError(f"--score: no caption has a value of {score!r} in {run.folder}")
    guarantee = find_threshold(scores, labelled, precision=precision, confidence=confidence)
    write_certificate(run, score, guarantee)
    wanted = f"{precision:.0%} acceptable with {confidence:.0%} confidence"
    if guarantee.threshold is None:
        yield f"no threshold of {score} is known to be {wanted} from {format_quantity(len(labelled), 'label')}"
        if guarantee.num_more:
            yield f"about {guarantee.num_more:,} more labels among the best-scored captions would be needed"
        else:
            yield f"the captions with the best {score} are acceptable less often than {precision:.0%}"
        return
    bound = f"{guarantee.bound:.1%} by {format_quantity(guarantee.num_labels, 'label')} there"
    yield f"{score} >= {guarantee.threshold!r}: at least {wanted} ({bound}); keeps {guarantee.kept:.1%} of captions"
    yield f"{run.folder / CERTIFICATE}: its certificate, which status, report and dataset card show"
    yield "in run.toml:"
    yield f'  [filter.rules]\n  audited = "{score} >= {guarantee.threshold!r}"'


def _check_score(run: Run, score: str | None) -> None:
    if score is None:
        raise UserError("--precision needs --score: the name of the score whose threshold is wanted")
    if score not in run.sections["score"]:
        known = ", ".join(sorted(run.sections["score"])) or "(there are none)"
        raise UserError(f"--score: {score!r} is not a score of {run.file}; it has {known}")


def collect_scores(audits: Sequence[PopulationAudit], score: str) -> tuple[list[float], list[tuple[float, bool]]]:
    """A score's values over all captions, and value and label of an even draw from them.

    More of one population are labelled than of the other; the first labels of the draw are used, in equal proportion.
    """
    rates = [len(audit.verdicts) / audit.size for audit in audits if audit.size]
    shown = [len(audit.captions) / audit.size for audit in audits if audit.size]
    values: list[float] = []
    labelled: list[tuple[float, bool]] = []
    for audit in audits:
        num_shown, num_labels = round(min(shown) * audit.size), round(min(rates) * audit.size)
        found = (_find_value(caption, score) for caption in audit.captions[:num_shown])
        values += [value for value in found if value is not None]
        for place in sorted(audit.verdicts)[:num_labels]:
            value = _find_value(audit.captions[place], score)
            if value is not None:
                labelled.append((value, audit.verdicts[place]))
    return values, labelled


def _find_value(caption: DrawnCaption, score: str) -> float | None:
    return next((one.value for one in caption.scores if one.name == score), None)
