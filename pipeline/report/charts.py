"""The geometry of charts: shapes of inline SVG in chart units, for a template to draw.

Colours are class names that the style sheet defines. It knows the numbers of a report, but neither tables nor runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.progress import format_count, format_quantity
from pipeline.report.numbers import NUM_BINS, Distribution, Lengths, MetricCurve

WIDTH, HEIGHT = 360, 150  # of a chart; the page scales it
TOP, BOTTOM = 10, 22  # margins above and below the plot
LEFT = 50  # margin for the labels beside curves
AXIS = HEIGHT - BOTTOM  # y of the x axis
NUM_COLUMNS = 30  # of a histogram of lengths
SHOWN_FIRST = ("loss", "mean_token_accuracy", "reward", "words")  # curves of results; those after them explain


@dataclass(frozen=True, kw_only=True)
class Part:
    """A segment of a bar."""

    label: str
    size: float
    tone: str  # accent, warn, plain, v0 to v4


@dataclass(frozen=True, kw_only=True)
class Rect:
    """A rectangle with a tooltip."""

    label: str
    tone: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class AxisLabel:
    """A label on an axis."""

    label: str
    x: float
    y: float
    anchor: str  # start, middle, end


@dataclass(frozen=True, kw_only=True)
class Path:
    """A line with a tooltip."""

    label: str
    tone: str
    d: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Shapes of a chart of WIDTH times HEIGHT units, to be drawn in this order."""

    title: str  # for screen readers
    grid: float | None = None  # y of a grid line
    axis_start: float = 0
    rects: tuple[Rect, ...] = ()
    paths: tuple[Path, ...] = ()
    texts: tuple[AxisLabel, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """One bin of a histogram."""

    label: str
    size: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    tone: str
    points: tuple[tuple[float, float], ...]  # by x


def layout_bar(parts: Sequence[Part], total: float) -> list[Rect]:
    """Segments side by side on a bar of 100 times 10 units, which represents `total`."""
    rects, x = list[Rect](), 0.0
    for part in parts:
        width = 100 * part.size / total if total else 0
        rects.append(Rect(label=part.label, tone=part.tone, x=x, y=0, width=width, height=10))
        x += width
    return rects


def plot_lengths(lengths: Lengths, alt_text: Lengths | None, bin_width: int) -> Chart:
    """A histogram of caption lengths, with the outline of the alt text's lengths."""
    return plot_histogram(
        f"How many words the captions of {lengths.name} have, beside the alt text",
        _bin_lengths(lengths, bin_width),
        ticks=[(place, format_count(place * bin_width)) for place in range(0, NUM_COLUMNS, 6)],
        outline=_bin_lengths(alt_text, bin_width) if alt_text else (),
    )


def choose_bin_width(lengths: Sequence[Lengths]) -> int:
    """Words in a bin, so that NUM_COLUMNS bins hold 99 % of each pass's texts."""
    longest = max([1, *(one.quantile(0.99) for one in lengths)])
    return -(-(longest + 1) // NUM_COLUMNS)


def _bin_lengths(lengths: Lengths, bin_width: int) -> list[Column]:
    """Shares of the texts, so that different numbers of texts compare; the last bin holds all longer ones."""
    counts = [0] * NUM_COLUMNS
    for words, count in lengths.counts:
        counts[min(words // bin_width, NUM_COLUMNS - 1)] += count
    spans = [f"{place * bin_width} to {place * bin_width + bin_width - 1} words" for place in range(NUM_COLUMNS)]
    spans[-1] = f"{(NUM_COLUMNS - 1) * bin_width} words or more"
    return [
        Column(label=f"{span}: {format_share(count, lengths.total)}", size=count / lengths.total)
        for span, count in zip(spans, counts, strict=True)
    ]


def plot_scores(scores: Distribution) -> Chart:
    """A histogram of scores."""
    step = 1 / NUM_BINS
    columns = [
        Column(label=f"{place * step:.2f} to {(place + 1) * step:.2f}: {format_quantity(count, 'caption')}", size=count)
        for place, count in enumerate(scores.bins)
    ]
    ticks = [(round(place * NUM_BINS / 4), f"{place / 4:g}") for place in range(5)]
    return plot_histogram(f"Scores: {scores.score} of {scores.caption}", columns, ticks=ticks)


def plot_histogram(
    title: str, columns: Sequence[Column], *, ticks: Sequence[tuple[int, str]], outline: Sequence[Column] = ()
) -> Chart:
    """Columns side by side, with the outline of other columns in the same bins.

    Args:
        title: for screen readers.
        columns: the bins, from left to right.
        ticks: (bin, label at its left edge).
        outline: bins of something to compare with.
    """
    largest = max([1e-9, *(column.size for column in (*columns, *outline))])
    step = WIDTH / len(columns)

    def height(column: Column) -> float:
        return (AXIS - TOP) * column.size / largest

    rects = [
        Rect(label=c.label, tone="accent", x=i * step + 1, y=AXIS - height(c), width=step - 2, height=height(c))
        for i, c in enumerate(columns)
    ]
    stairs = "L".join(f"{i * step:.1f} {AXIS - height(c):.1f}H{(i + 1) * step:.1f}" for i, c in enumerate(outline))
    return Chart(
        title=title,
        rects=tuple(rects),
        paths=(Path(label="", tone="outline", d=f"M{stairs}"),) if outline else (),
        texts=tuple(_place_tick(place * step, label) for place, label in ticks),
    )


def _place_tick(x: float, label: str) -> AxisLabel:
    anchor = "start" if x < 10 else "end" if x > WIDTH - 10 else "middle"
    return AxisLabel(label=label, x=x, y=HEIGHT - 6, anchor=anchor)


def group_curves(curves: Sequence[MetricCurve]) -> list[tuple[str, list[Line]]]:
    """(metric, its curves in training and on held-out samples), metrics of results first."""
    charts: dict[str, list[Line]] = {}
    for curve in curves:
        if curve.name.startswith(("eval_", "eval/")):
            line = Line(label="held out", tone="ink", points=curve.points)
        else:
            line = Line(label="training", tone="accent", points=curve.points)
        charts.setdefault(curve.name.removeprefix("eval_").removeprefix("eval/"), []).append(line)
    return sorted(charts.items(), key=lambda chart: chart[0] not in SHOWN_FIRST)


def plot_curves(title: str, lines: Sequence[Line]) -> Chart:
    """Curves over one x axis from 0; the y axis spans the values and is labelled with the smallest and the largest."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high, last = min(ys), max(ys), max(1, *xs)
    return Chart(
        title=title,
        grid=TOP,
        axis_start=LEFT,
        paths=tuple(
            Path(label=line.label, tone=f"line {line.tone}", d=_trace_points(line.points, last, low, high))
            for line in lines
        ),
        texts=(
            AxisLabel(label=_format_value(high), x=LEFT - 6, y=TOP + 4, anchor="end"),
            AxisLabel(label=_format_value(low), x=LEFT - 6, y=AXIS + 4, anchor="end"),
            AxisLabel(label="0", x=LEFT, y=HEIGHT - 6, anchor="start"),
            AxisLabel(label=f"step {last:,.0f}", x=WIDTH, y=HEIGHT - 6, anchor="end"),
        ),
    )


def _trace_points(points: Sequence[tuple[float, float]], last: float, low: float, high: float) -> str:
    width, height = WIDTH - LEFT - 2, AXIS - TOP
    spread = (high - low) or 1.0
    steps = (f"{LEFT + width * x / last:.1f} {TOP + height * (high - y) / spread:.1f}" for x, y in points)
    return f"M{'L'.join(steps)}h0"  # h0 draws a dot where there is a single point


def _format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def choose_tone(value: float | None) -> str:
    """The colour of a value in [0, 1], from worst, v0, to best, v4."""
    return "plain" if value is None else f"v{round(4 * min(1.0, max(0.0, value)))}"


def format_share(count: float, total: float) -> str:
    """A percentage that does not break over lines.

    >>> format_share(1, 3), format_share(1, 1), format_share(1, 10_000)
    ('33\xa0%', '100\xa0%', '0.01\xa0%')
    """
    percent = 100 * count / total if total else 0.0
    return f"{percent:.0f}\xa0%" if percent >= 10 or percent == 0 else f"{percent:.2g}\xa0%"
