"""Decides how each of a report's numbers is shown: bars for counts, columns for spreads, a table for costs.

A section of which a run has nothing yet is left out. It computes no number and knows no sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeline.progress import duration, short
from pipeline.report.charts import Column, Line, Part, bar, curves, histogram, legend
from pipeline.report.markup import Html, clip, el, join
from pipeline.report.numbers import NUM_BINS, Answers, Cost, Curve, Distribution, Lengths, Report, Tally

MAX_CHARS = 200  # of a text in a table
NUM_COLUMNS = 30  # of a histogram of lengths
STEPS = {
    "in": "files that the corpus has",
    "usable": "decoded as a picture",
    "captioned": "with at least one finished caption",
    "kept": "with a caption that met every condition",
    "exported": "written to the training set",
}
ANSWERED = (("v4", "best"), ("v2", "middling"), ("v0", "worst"), ("plain", "cannot say"))  # tone, meaning


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    lead: str | None = None  # what one looks at
    body: Html


def sections(report: Report) -> Iterator[Section]:
    """What came of the run, from its inputs to its captions."""
    if report.funnel["in"]:
        yield _funnel(report)
        yield _statuses(report)
    if report.captions:
        yield _captions(report)
    if report.scores:
        yield _scores(report.scores)
    if report.answers:
        yield _criteria(report.answers)
    if report.curves:
        yield _training(report.curves)


def closing(report: Report) -> Iterator[Section]:
    """What it took and how it was set up."""
    if report.costs:
        yield _costs(report)
    yield _settings(report)


def _funnel(report: Report) -> Section:
    whole = report.funnel["in"]
    rows = (
        _row(join(el("b", name), _note(STEPS[name])), [Part(label=name, size=count, tone="accent")], of=whole)
        for name, count in report.funnel.items()
    )
    return Section(title="From corpus to training set", body=el("table", rows, class_="bars funnel"))


def _row(label: Html | str, parts: Sequence[Part], *, of: float, note: str | None = None) -> Html:
    """A line of a table: what it is, a bar, how many, and what share."""
    count = sum(part.size for part in parts)
    return el(
        "tr",
        el("th", label, note and _note(clip(note, MAX_CHARS)), scope="row"),
        el("td", bar(parts, of=of), class_="bar"),
        el("td", short(count), class_="num"),
        el("td", share(count, of), class_="num share"),
    )


def _note(text: str) -> Html:
    return el("span", text, class_="note")


def _card(title: str, *children: Html | Iterable[Html], note: str | None = None) -> Html:
    return el("div", el("h3", title), *children, note and el("p", note, class_="note"), class_="card")


def _grid(cards: Iterable[Html], *, wide: bool = False) -> Html:
    return el("div", cards, class_="grid wide" if wide else "grid")


# What became of images and captions.


def _statuses(report: Report) -> Section:
    cards = [_card("Images", _bars(report.images, other="plain", of=report.funnel["in"]))]
    cards += _cards("Captions", report.captions, report, other="plain")
    cards += _cards("Refused", report.refusals, report, other="warn")
    return Section(
        title="Statuses and refusals",
        lead="A sample that cannot be used is a row with a status; none is lost. A caption is refused by the first "
        "condition that it does not meet, or because a scorer could not judge it.",
        body=_grid(cards),
    )


def _captions(report: Report) -> Section:
    cards = [*_lengths(report.lengths), *_cards("Noticed in the text", report.flags, report, other="warn")]
    if any(tally.label not in ("0", "1") for tally in report.attempts):
        cards += _cards("The attempt at which it came", report.attempts, report, other="accent")
    return Section(
        title="Captions",
        lead="Their lengths in words beside the corpus's own alt text, and what was noticed in them and left in place.",
        body=_grid(cards),
    )


def _cards(title: str, tallies: Sequence[Tally], report: Report, *, other: str) -> Iterator[Html]:
    """A card for each caption pass, with shares of all its captions."""
    for name, group in groupby(tallies, key=lambda tally: tally.of):
        whole = sum(tally.count for tally in report.captions if tally.of == name)
        yield _card(f"{title}: {name}", _bars(list(group), other=other, of=whole))


def _bars(tallies: Sequence[Tally], *, other: str, of: int) -> Html:
    rows = (
        _row(
            tally.label,
            [Part(label=tally.label, size=tally.count, tone="accent" if tally.label == "ok" else other)],
            of=of,
            note=tally.example and f"e.g. {tally.example}",
        )
        for tally in tallies
    )
    return el("table", rows, class_="bars stacked")


def _lengths(lengths: Sequence[Lengths]) -> Iterator[Html]:
    alt = next((one for one in lengths if not one.name), None)
    most = max([1, *(one.quantile(0.99) for one in lengths)])
    width = -(-(most + 1) // NUM_COLUMNS)
    for one in lengths:
        if one.name:
            yield _length(one, alt, width)


def _length(one: Lengths, alt: Lengths | None, width: int) -> Html:
    chart = histogram(
        f"How many words the captions of {one.name} have, beside the alt text",
        _binned(one, width),
        tone="accent",
        ticks=[(place, short(place * width)) for place in range(0, NUM_COLUMNS, 6)],
        outline=_binned(alt, width) if alt else (),
    )
    note = f"Median {_words(one.quantile(0.5))}; nine in ten have at most {short(one.quantile(0.9))}. "
    note += f"Alt text: median {_words(alt.quantile(0.5))}." if alt else "The corpus has no alt text."
    keys = legend([("accent", "captions"), *([("outline", "alt text")] if alt else [])])
    return _card(f"Words: {one.name}", chart, keys, note=note)


def _binned(lengths: Lengths, width: int) -> list[Column]:
    """Shares of the texts, so that different numbers of them compare; the last bin has all that are longer."""
    sums = [0] * NUM_COLUMNS
    for words, count in lengths.counts:
        sums[min(words // width, NUM_COLUMNS - 1)] += count
    spans = [f"{place * width} to {place * width + width - 1} words" for place in range(NUM_COLUMNS)]
    spans[-1] = f"{(NUM_COLUMNS - 1) * width} words or more"
    return [
        Column(label=f"{span}: {share(num, lengths.total)}", size=num / lengths.total)
        for span, num in zip(spans, sums, strict=True)
    ]


# Scores and their criteria.


def _scores(scores: Sequence[Distribution]) -> Section:
    return Section(
        title="Scores",
        lead="How many captions got which score, from 0, the worst, to 1. What a scorer could not judge has none.",
        body=_grid(map(_distribution, scores)),
    )


def _distribution(one: Distribution) -> Html:
    step = 1 / NUM_BINS
    columns = [
        Column(label=f"{place * step:.2f} to {(place + 1) * step:.2f}: {short(count)} captions", size=count)
        for place, count in enumerate(one.bins)
    ]
    title = f"{one.score} of {one.caption}"
    ticks = [(round(place * NUM_BINS / 4), f"{place / 4:g}") for place in range(5)]
    note = (
        "Nothing could be scored." if one.mean is None else f"Mean {one.mean:.2f} of {short(sum(one.bins))} captions."
    )
    note += f" {short(one.num_unknown)} could not be judged." if one.num_unknown else ""
    return _card(title, histogram(f"Scores: {title}", columns, tone="accent", ticks=ticks), note=note)


def _criteria(answers: Sequence[Answers]) -> Section:
    cards = (
        _card(f"{score} of {caption}", el("table", map(_criterion, group), class_="bars stacked answers"))
        for (score, caption), group in groupby(answers, key=lambda one: (one.score, one.caption))
    )
    return Section(
        title="Criteria",
        lead="Each criterion of each score: the share of captions that got each answer, and the mean of their values.",
        body=join(legend(ANSWERED), _grid(cards, wide=True)),
    )


def _criterion(one: Answers) -> Html:
    whole = sum(answer.count for answer in one.answers)
    parts = [
        Part(label=f"{said(a.verdict, a.value)}, {share(a.count, whole)}", size=a.count, tone=tone(a.value))
        for a in one.answers
    ]
    words = ", ".join(f"{said(answer.verdict, answer.value)} {share(answer.count, whole)}" for answer in one.answers)
    return el(
        "tr",
        el("th", one.criterion, _note(words), scope="row"),
        el("td", bar(parts, of=whole), class_="bar"),
        el("td", "" if one.mean is None else f"{one.mean:.2f}", class_="num"),
    )


def said(verdict: str | None, value: float | None) -> str:
    """A verdict in words."""
    return clip(verdict, 60) if verdict is not None else "cannot say" if value is None else "scored"


def tone(value: float | None) -> str:
    """A colour from worst to best."""
    return "plain" if value is None else f"v{round(4 * min(1.0, max(0.0, value)))}"


# Training, costs and settings.

FIRST = ("loss", "mean_token_accuracy", "reward", "words")  # of the curves; those that say why come after


def _training(found: Sequence[Curve]) -> Section:
    """Figures that were measured in training and on held-out samples share a picture."""
    pictures: dict[str, list[Line]] = {}
    for curve in found:
        held_out = curve.name.startswith(("eval_", "eval/"))
        name = curve.name[5:] if held_out else curve.name
        line = Line(
            label="held out" if held_out else "training", tone="ink" if held_out else "accent", points=curve.points
        )
        pictures.setdefault(name, []).append(line)
    cards = (
        _card(
            name,
            curves(name, lines),
            legend([(line.tone, f"{line.label}: {line.points[-1][1]:.4g}") for line in lines]),
        )
        for name, lines in sorted(pictures.items(), key=lambda picture: picture[0] not in FIRST)
    )
    return Section(title="Training", lead="Step by step; below each curve stands its last value.", body=_grid(cards))


COLUMNS = ("pass", "shards", "rows", "failed", "asked again", "time", "rows/s", "tokens in", "tokens out", "waiting")


def _costs(report: Report) -> Section:
    head = el("tr", (el("th", name, scope="col", class_="num" if i else None) for i, name in enumerate(COLUMNS)))
    rows = (_cost(cost, report.num_shards) for cost in report.costs)
    return Section(
        title="Costs",
        lead="Time is that of all workers together, rows/s that of one; tokens are per row. Waiting is the share of "
        "the time in which the engine had nothing to do.",
        body=el("div", el("table", el("thead", head), el("tbody", rows), class_="plain"), class_="scroll"),
    )


def _cost(cost: Cost, num_shards: int) -> Html:
    def each(num: int) -> str:
        return f"{num / cost.num_rows:,.0f}" if cost.num_rows and num else ""

    cells = (
        f"{short(cost.num_shards)}/{short(num_shards)}",
        short(cost.num_rows),
        short(cost.num_errors) if cost.num_errors else "",
        short(cost.num_retries) if cost.num_retries else "",
        duration(cost.seconds),
        "" if cost.rows_per_second is None else f"{cost.rows_per_second:,.1f}",
        each(cost.num_prompt_tokens),
        each(cost.num_output_tokens),
        "" if cost.waiting is None else f"{cost.waiting:.0%}",
    )
    return el("tr", el("th", cost.title, scope="row"), (el("td", cell, class_="num") for cell in cells))


def _settings(report: Report) -> Section:
    blocks = (
        el(
            "div",
            el("h3", setting.section),
            el("dl", (join(el("dt", name), el("dd", clip(value, MAX_CHARS))) for name, value in setting.values)),
            class_="setting",
        )
        for setting in report.settings
    )
    return Section(
        title="Settings",
        lead="What run.toml sets and decides the rows; all else has its default, or says only where and how fast.",
        body=el("div", blocks, class_="settings"),
    )


def share(count: float, of: float) -> str:
    """A percentage that does not break over lines.

    >>> share(1, 3), share(1, 1), share(1, 10_000)
    ('33\xa0%', '100\xa0%', '0.01\xa0%')
    """
    percent = 100 * count / of if of else 0.0
    return f"{percent:.0f}\xa0%" if percent >= 10 or percent == 0 else f"{percent:.2g}\xa0%"


def _words(num: int) -> str:
    return f"{short(num)} word{'' if num == 1 else 's'}"
