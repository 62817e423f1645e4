"""The report as one self-contained HTML file, for people who do not know the run.

Every value that a template prints is escaped, and characters that would be invisible are replaced. The page's content
security policy allows its own style, embedded images, and the one script of the template, by its digest: it filters the
samples, and no text of a corpus can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.progress import format_count, format_duration, format_quantity
from pipeline.records import Criterion
from pipeline.report import charts
from pipeline.report.charts import Part, choose_tone, format_share
from pipeline.report.numbers import AnswerCount, Cost, CriterionAnswers, ReportNumbers, read_numbers
from pipeline.report.samples import Sheet, draw_sheets
from pipeline.sections import Run
from pipeline.storage import tables

# Control characters, which no page may hold, and surrogates, which UTF-8 cannot encode.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
STEPS = {
    "in": "files in the corpus",
    "usable": "decoded as an image",
    "captioned": "with at least one finished caption",
    "kept": "with a caption that met every condition",
    "exported": "written to the training set",
}
ANSWER_TONES = (("v4", "best"), ("v2", "middling"), ("v0", "worst"), ("plain", "cannot say"))  # tone, meaning
SHEETS = {  # kind -> title, lead
    "kept": (
        "Random kept",
        "Images with a caption that met every condition. The chosen caption comes first; it is exported.",
    ),
    "worst": ("Worst kept", "Kept images whose chosen captions have the lowest mean score."),
    "best": (
        "Best refused",
        "Refused images whose captions have the highest mean score, some for each reason.",
    ),
    "refused": ("Random refused", "Images without a caption that met every condition, some for each reason."),
    "captioned": ("Captioned", "Nothing is filtered yet; these captions are unfiltered."),
    "usable": ("Images", "Nothing is captioned yet; these are images of the corpus."),
    "unusable": (
        "Unusable",
        "Files that could not be decoded, some for each status. They remain in the tables as rows.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The choices of the filter bar: (value, text)."""

    sheets: tuple[tuple[str, str], ...]
    outcomes: tuple[tuple[str, str], ...]
    passes: tuple[tuple[str, str], ...]
    flags: tuple[tuple[str, str], ...]
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """A section of the page."""

    template: str  # its branch in the template
    title: str
    lead: str = ""
    lines: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.title.lower().replace(" ", "-")


def write_report(
    run: Run, *, num_images: int = 60, judges: Sequence[str] = (), certificate: Sequence[str] = ()
) -> Path:
    """Writes `<run>/report.html` atomically.

    Args:
        run: in any state.
        num_images: maximum number of samples to show.
        judges: lines on how far judges notice planted errors.
        certificate: lines on the guarantee that an audit has found.
    """
    path = run.folder / "report.html"
    sheets = list(draw_sheets(run, num_images=num_images))
    text = render_page(read_numbers(run), sheets, judges=judges, certificate=certificate)
    with tables.open_atomic(path) as file:
        file.write(text.encode())
    return path


def render_page(
    numbers: ReportNumbers, sheets: Sequence[Sheet], *, judges: Sequence[str] = (), certificate: Sequence[str] = ()
) -> str:
    sections = list(_list_sections(numbers, sheets, judges, certificate))
    environment = make_environment()
    digest = hashlib.sha256(environment.get_template("page.js").render().encode()).digest()
    return environment.get_template("report.html.j2").render(
        numbers=numbers,
        summary=summarise_run(numbers),
        sections=sections,
        sheets=sheets,
        filters=_list_filters(sheets),
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
    )


def _list_filters(sheets: Sequence[Sheet]) -> Filters:
    captions = [judged for sheet in sheets for sample in sheet.samples for judged in sample.captions]

    def choices(values: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((value, value) for value in sorted(set(values)) if value)

    return Filters(
        sheets=tuple((f"samples-{sheet.kind}", SHEETS[sheet.kind][0]) for sheet in sheets),
        outcomes=choices(judged.outcome for judged in captions),
        passes=choices(judged.caption.name for judged in captions),
        flags=choices(flag for judged in captions for flag in judged.caption.flags),
        scores=choices(name for judged in captions for name in judged.values),
    )


def make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        finalize=_format_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= vars(charts) | {
        "STEPS": STEPS,
        "SHEETS": SHEETS,
        "ANSWER_TONES": ANSWER_TONES,
        "MAX_CELL": 200,  # characters of a table's cell
        "MAX_TEXT": 4000,  # characters of a caption or an alt text
        "MAX_REASON": 200,  # characters
        "MAX_CRITERIA": 60,  # of a score
    }
    environment.filters |= {
        "answer": describe_answer,
        "answer_parts": _answer_parts,
        "base64": lambda data: base64.b64encode(data).decode(),
        "clip": clip_text,
        "date": lambda seconds: f"{datetime.fromtimestamp(seconds, UTC):%d %B %Y, %H:%M} UTC",
        "duration": format_duration,
        "group_answers": _group_answers,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "per_row": _per_row,
        "score_parts": _score_parts,
        "share": format_share,
        "short": format_count,
        "tone": choose_tone,
        "words": lambda num: f"{format_count(num)} word{'' if num == 1 else 's'}",
    }
    return environment


def _list_sections(
    numbers: ReportNumbers, sheets: Sequence[Sheet], judges: Sequence[str], certificate: Sequence[str]
) -> Iterator[PageSection]:
    """The sections of which the run has data."""
    if numbers.funnel["in"]:
        yield PageSection(template="funnel", title="From corpus to training set")
        yield PageSection(
            template="statuses",
            title="Statuses and refusals",
            lead="Every input is a row with a status; none is dropped. A caption is refused by the first condition "
            "that it does not meet, or because a scorer could not judge it.",
        )
    if numbers.captions:
        yield PageSection(
            template="captions",
            title="Captions",
            lead="Caption lengths in words compared with the corpus's own alt text, and the flags of captions.",
        )
    if numbers.scores:
        yield PageSection(
            template="scores",
            title="Scores",
            lead="Captions by score, from 0 (worst) to 1. Captions that a scorer could not judge have no score.",
        )
    if numbers.answers:
        yield PageSection(
            template="criteria",
            title="Criteria",
            lead="For each criterion of each score: the share of captions with each answer, and the mean value.",
        )
    if judges:
        yield PageSection(
            template="lines",
            title="Judges",
            lead="How far each judge notices errors planted in copies of captions; see docs/quality.md.",
            lines=tuple(judges),
        )
    if certificate:
        yield PageSection(
            template="lines",
            title="Certificate",
            lead="What an audit with people's labels guarantees; see docs/quality.md.",
            lines=tuple(certificate),
        )
    if numbers.curves:
        yield PageSection(
            template="training", title="Training", lead="Metrics by step, with the last value below each curve."
        )
    if sheets:
        yield PageSection(
            template="samples",
            title="Samples",
            lead="Click a picture to enlarge it. The bar of a score has a part for each criterion, as wide as its "
            "weight; click it to see the reasons.",
        )
    if numbers.costs:
        yield PageSection(
            template="costs",
            title="Costs",
            lead="Time is the sum over all workers, rows/s is the rate of one worker, and tokens are per row. Waiting "
            "is the share of time in which the engine was idle.",
        )
    yield PageSection(
        template="settings",
        title="Settings",
        lead="Keys of run.toml that are set and decide rows. All others have defaults or affect only speed and place.",
    )


def summarise_run(numbers: ReportNumbers) -> str:
    """The run in a sentence or two."""
    funnel = numbers.funnel
    missing = max(0, (numbers.num_planned or 0) - funnel["in"])
    more = f" {format_count(missing)} more {'is' if missing == 1 else 'are'} planned." if missing else ""
    if not funnel["in"]:
        return f"No image has been read yet.{more}"
    parts = [f"Of {format_quantity(funnel['in'], 'image')}, {format_count(funnel['usable'])} could be used"]
    if numbers.captions:
        parts.append(f"{format_count(funnel['captioned'])} {_was(funnel['captioned'])} captioned")
    if numbers.refusals or funnel["kept"]:
        parts.append(f"{format_count(funnel['kept'])} {_was(funnel['kept'])} kept")
    return ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + f"{parts[-1]}.{more}"


def _was(num: int) -> str:
    return "was" if num == 1 else "were"


def _format_value(value: Any) -> Any:
    """Coordinates to two decimals, and text with its invisible characters replaced."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, str) and not isinstance(value, Markup):
        return INVISIBLE.sub(_make_visible, value)
    return value


def _make_visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def clip_text(text: str, limit: int) -> str:
    """Text cut to `limit` characters, followed by its full length.

    >>> clip_text("abcdef", 3)
    'abc… (6 characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def describe_answer(answer: AnswerCount | Criterion) -> str:
    if answer.verdict is not None:
        return clip_text(answer.verdict, 60)
    return "cannot say" if answer.value is None else "scored"


def _answer_parts(answers: Sequence[AnswerCount]) -> list[Part]:
    total = sum(answer.count for answer in answers)
    return [
        Part(
            label=f"{describe_answer(answer)}, {format_share(answer.count, total)}",
            size=answer.count,
            tone=choose_tone(answer.value),
        )
        for answer in answers
    ]


def _score_parts(criteria: Sequence[Criterion]) -> list[Part]:
    return [
        Part(label=f"{c.id}: {describe_answer(c)}", size=c.weight, tone=choose_tone(c.value))
        for c in criteria
        if c.weight
    ]


def _group_answers(answers: Sequence[CriterionAnswers]) -> Iterator[tuple[str, list[CriterionAnswers]]]:
    for (score, caption), group in groupby(answers, key=lambda one: (one.score, one.caption)):
        yield f"{score} of {caption}", list(group)


def _per_row(num_tokens: int, cost: Cost) -> str:
    return f"{num_tokens / cost.num_rows:,.0f}" if cost.num_rows and num_tokens else ""
