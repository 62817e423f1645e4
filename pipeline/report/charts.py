"""Decides how numbers are drawn: a few charts as inline SVG, each with a title that a screen reader reads.

Colours are names of classes, which a style sheet gives their values. It knows no tables and no runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.report.markup import Html, el, join

WIDTH, HEIGHT = 360, 150  # of a chart, in its own units; the page scales it
TOP, BOTTOM = 10, 22  # room above and below what is drawn
LEFT = 50  # room for the numbers beside a curve


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share of a bar."""

    label: str
    size: float
    tone: str  # accent, warn, plain, v0 to v4, ...


@dataclass(frozen=True, kw_only=True)
class Column:
    """One bin of a histogram."""

    label: str
    size: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    tone: str
    points: tuple[tuple[float, float], ...]  # by x


def bar(parts: Sequence[Part], *, of: float) -> Html:
    """One horizontal bar of parts side by side; its whole width is `of`. It stretches to where it stands."""
    title = ", ".join(f"{part.label}: {part.size:,.0f}" for part in parts)
    rects, x = [el("rect", class_="rail", width=100, height=10)], 0.0
    for part in parts:
        width = 100 * part.size / of if of else 0
        rects.append(el("rect", el("title", part.label), class_=part.tone, x=x, width=width, height=10))
        x += width
    return el(
        "svg", el("title", title), rects, class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", role="img"
    )


def histogram(
    title: str,
    columns: Sequence[Column],
    *,
    tone: str,
    ticks: Sequence[tuple[int, str]],
    outline: Sequence[Column] = (),
) -> Html:
    """Columns side by side, and over them the outline of others in the same bins.

    Args:
        title: what is drawn, for who cannot see it.
        columns: the bins, from left to right.
        tone: their colour.
        ticks: the number of a bin, at its left edge -> what stands there under the axis.
        outline: bins of something to compare with.
    """
    most = max([1e-9, *(c.size for c in (*columns, *outline))])
    step, floor = WIDTH / len(columns), HEIGHT - BOTTOM
    tall = [(floor - TOP) * column.size / most for column in columns]
    bars = [
        el("rect", el("title", c.label), class_=tone, x=i * step + 1, y=floor - h, width=step - 2, height=h)
        for i, (c, h) in enumerate(zip(columns, tall, strict=True))
    ]
    heights = (floor - (floor - TOP) * column.size / most for column in outline)
    stairs = "L".join(f"{i * step:.1f} {y:.1f}H{(i + 1) * step:.1f}" for i, y in enumerate(heights))
    path = el("path", class_="outline", d=f"M{stairs}") if outline else None
    return _chart(title, bars, path, _axis(floor), (_tick(i * step, label) for i, label in ticks))


def curves(title: str, lines: Sequence[Line]) -> Html:
    """Curves over one x axis from 0, the y axis fitted to them, with its least and greatest value beside it."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high, last = min(ys), max(ys), max(1, *xs)
    floor = HEIGHT - BOTTOM
    paths = [
        el("path", el("title", line.label), class_=f"line {line.tone}", d=_path(line.points, last, low, high))
        for line in lines
    ]
    marks = [
        el("text", _short(value), x=LEFT - 6, y=y + 4, text_anchor="end") for value, y in ((high, TOP), (low, floor))
    ]
    top = el("line", class_="grid", x1=LEFT, x2=WIDTH, y1=TOP, y2=TOP)
    ticks = (el("text", label, x=x, y=HEIGHT - 6, text_anchor=a) for x, label, a in _ends(last))
    return _chart(title, top, _axis(floor, start=LEFT), marks, ticks, paths)


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """What the colours mean: (tone, label)."""
    return el("p", (join(el("i", class_=f"key {tone}"), el("span", label)) for tone, label in entries), class_="legend")


def _path(points: Sequence[tuple[float, float]], last: float, low: float, high: float) -> str:
    wide, tall = WIDTH - LEFT - 2, HEIGHT - BOTTOM - TOP
    spread = (high - low) or 1.0
    steps = (f"{LEFT + wide * x / last:.1f} {TOP + tall * (high - y) / spread:.1f}" for x, y in points)
    return f"M{'L'.join(steps)}h0"  # which draws a dot where there is a single point


def _ends(last: float) -> Iterator[tuple[float, str, str]]:
    yield LEFT, "0", "start"
    yield WIDTH, f"step {last:,.0f}", "end"


def _axis(y: float, *, start: float = 0) -> Html:
    return el("line", class_="axis", x1=start, x2=WIDTH, y1=y, y2=y)


def _tick(x: float, label: str) -> Html:
    anchor = "start" if x < 10 else "end" if x > WIDTH - 10 else "middle"
    return el("text", label, x=x, y=HEIGHT - 6, text_anchor=anchor)


def _chart(title: str, *drawn: Html | Iterator[Html] | Sequence[Html] | None) -> Html:
    return el("svg", el("title", title), *drawn, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
