"""Decides how a sample is shown: its picture, what the corpus said of it, its captions, and what was said of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from pipeline.progress import short
from pipeline.records import Criterion, Score
from pipeline.report.charts import Part, bar, legend
from pipeline.report.figures import ANSWERED, Section, said, tone
from pipeline.report.markup import Html, clip, el, join
from pipeline.report.samples import Sample, Sheet, Shown

MAX_CHARS = 900  # of a caption or an alt text
MAX_REASON = 200
MAX_CRITERIA = 60  # of a score
SHEETS = {
    "kept": ("Kept", "Images whose chosen caption met every condition; it stands first and is what a trainer gets."),
    "refused": ("Refused", "Images none of whose captions met every condition, some for each reason."),
    "captioned": ("Captioned", "Nothing is filtered yet: these are captions as they came."),
    "usable": ("Images", "Nothing is captioned yet: these are images as the corpus has them."),
    "unusable": ("Unusable", "Files that gave no picture, some for each status. They stay in the tables, as rows."),
}
STRIP = "A bar has a part for each criterion, as wide as it weighs; the reasons open with a click."


def section(sheet: Sheet) -> Section:
    title, lead = SHEETS[sheet.kind]
    scored = any(shown.scores for sample in sheet.samples for shown in sample.captions)
    return Section(
        title=title,
        lead=f"{lead} {STRIP}" if scored else lead,
        body=join(legend(ANSWERED) if scored else None, el("div", map(_sample, sheet.samples), class_="sheet")),
    )


def _sample(sample: Sample) -> Html:
    image = sample.image
    size = f"{image.width} × {image.height}" if image.width else None
    more = sample.num_captions - len(sample.captions)
    return el(
        "article",
        _picture(sample),
        el("p", " · ".join(filter(None, (image.key, size, image.format))), class_="about"),
        el("p", clip(image.source_key, 120), class_="about", dir="auto"),
        _alt_text(image.alt_text),
        map(_caption, sample.captions),
        el("p", f"and {short(more)} more captions", class_="about") if more else None,
    )


def _picture(sample: Sample) -> Html:
    if sample.thumbnail is None:
        status = "no picture" if sample.image.status == "ok" else sample.image.status
        return el("div", el("b", status), el("span", clip(sample.error or "", MAX_REASON)), class_="nothing")
    data = base64.b64encode(sample.thumbnail).decode()
    return el("img", src=f"data:image/jpeg;base64,{data}", alt=f"The image {sample.image.key}")


def _alt_text(text: str | None) -> Html:
    body = el("em", "none") if not text else el("span", clip(text, MAX_CHARS), dir="auto")
    return el("p", el("span", "alt text", class_="tag"), body, class_="alt")


def _caption(shown: Shown) -> Html:
    caption = shown.caption
    name = el("span", f"{caption.name}, candidate {caption.candidate}", class_="tag")
    flags = (el("span", flag, class_="badge") for flag in caption.flags)
    problem = None if caption.status == "ok" else f"{caption.status}: {caption.error or ''}"
    return el(
        "div",
        el("p", _badge(shown), flags, name, class_="head"),
        el("p", clip(caption.text, MAX_CHARS), class_="text", dir="auto") if caption.text else None,
        problem and el("p", clip(problem, MAX_REASON), class_="note"),
        map(_score, shown.scores),
        class_="caption",
    )


def _badge(shown: Shown) -> Html | None:
    verdict = shown.verdict
    if verdict is None:
        return None
    if verdict.keep:
        return el("span", "kept" if verdict.chosen else "kept, not chosen", class_="badge good")
    return el("span", f"refused: {verdict.reason}", class_="badge bad")


def _score(score: Score) -> Html:
    """The value and the strip stay in sight; what was said of each criterion opens."""
    criteria = score.criteria[:MAX_CRITERIA]
    value = score.status if score.value is None else f"{score.value:.2f}"
    head = el("summary", el("span", score.name), el("b", value), _strip(criteria))
    problem = None if score.error is None else el("p", clip(score.error, MAX_REASON), class_="note")
    return el("details", head, problem, el("ul", map(_verdict, criteria)))


def _strip(criteria: Sequence[Criterion]) -> Html | None:
    parts = [
        Part(label=f"{c.id}: {said(c.verdict, c.value)}", size=c.weight, tone=tone(c.value))
        for c in criteria
        if c.weight
    ]
    return bar(parts, of=sum(part.size for part in parts)) if parts else None


def _verdict(criterion: Criterion) -> Html:
    return el(
        "li",
        el("i", class_=f"key {tone(criterion.value)}"),
        el("span", criterion.id, " ", el("b", said(criterion.verdict, criterion.value))),
        el("span", clip(criterion.reason or "", MAX_REASON), class_="note", dir="auto"),
    )
