"""Decides what a report is as a whole: one HTML file that needs nothing else, for people who do not know the run.

There is no script in it, and its own policy forbids all but its style and its small pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from pipeline.progress import short
from pipeline.report import cards, figures
from pipeline.report.figures import Section
from pipeline.report.markup import Html, el, join
from pipeline.report.numbers import Report, read_numbers
from pipeline.report.samples import Sheet, draw_sheets
from pipeline.sections import Run
from pipeline.storage import tables

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: Run, *, num_images: int = 36) -> Path:
    """Writes `<run>/report.html`, whole or not at all.

    Args:
        run: in any state.
        num_images: samples that are shown, at most.
    """
    path = run.folder / "report.html"
    text = render(read_numbers(run), list(draw_sheets(run, num_images=num_images)))
    with tables.atomic(path) as file:
        file.write(text.encode())
    return path


def render(report: Report, contact: Sequence[Sheet]) -> str:
    sections = [*figures.sections(report), *map(cards.section, contact), *figures.closing(report)]
    body = (
        _header(report, sections),
        el("main", map(_section, sections)),
        el("footer", el("p", "Written by recap report. The tables beside it have all rows; recap sql asks them.")),
    )
    return "<!doctype html>\n" + el("html", _head(report), el("body", body), lang="en")


def _head(report: Report) -> Html:
    style = (resources.files("pipeline.report") / "page.css").read_text(encoding="utf-8")
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{report.name} · recap"),
        el("style", Html(style)),
    )


def _header(report: Report, sections: Sequence[Section]) -> Html:
    when = "" if report.until is None else f" · {datetime.fromtimestamp(report.until, UTC):%d %B %Y, %H:%M} UTC"
    links = (el("a", section.title, href=f"#{_id(section)}") for section in sections[1:])
    return el(
        "header",
        el("p", f"recap report{when}", class_="over"),
        el("h1", report.name),
        el("p", _summary(report), class_="lead"),
        el("nav", links, aria_label="Sections"),
    )


def _summary(report: Report) -> str:
    """The run in a sentence or two."""
    made = report.funnel
    missing = max(0, (report.num_planned or 0) - made["in"])
    more = f" {short(missing)} more are planned." if missing else ""
    if not made["in"]:
        return f"No image has been read yet.{more}"
    said = [f"Of {short(made['in'])} images, {short(made['usable'])} could be used"]
    if report.captions:
        said.append(f"{short(made['captioned'])} were captioned")
    if report.refusals or made["kept"]:
        said.append(f"{short(made['kept'])} were kept")
    return ", ".join(said[:-1]) + (" and " if said[1:] else "") + f"{said[-1]}.{more}"


def _section(section: Section) -> Html:
    lead = section.lead and el("p", section.lead, class_="note")
    return el("section", join(el("h2", section.title), lead), section.body, id=_id(section))


def _id(section: Section) -> str:
    return section.title.lower().replace(" ", "-")
