"""Charts as shapes: the numbers that the page's SVG is written from.

The shapes are made here and not by a charting library. One that draws in the browser would have
to be kept in this repository as a minified file, come with every report, and would show nothing
without its script; what a report needs is lines, two axes and a limit. The template escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from localrl.report.curves import Chart

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 156
"""Of the drawn area, in the units of the SVG's own coordinates."""
COLOURS = 5


@dataclass(frozen=True)
class Stroke:
    """A line with its gaps."""

    label: str
    style: str
    paths: tuple[str, ...]
    """`points` of one polyline for each piece without a gap."""
    dots: tuple[tuple[float, float], ...]
    """Values that stand alone, or all of a line that has few."""
    last: float


@dataclass(frozen=True)
class Drawing:
    """A chart, ready to be written."""

    chart: Chart
    strokes: tuple[Stroke, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    whiskers: tuple[tuple[float, float, float], ...]
    """x, upper and lower end."""
    limit: float | None
    """Height of the limit's line."""


def draw(chart: Chart) -> Drawing:
    """The shapes of a chart that has at least one value."""
    first, last = chart.steps[0], chart.steps[-1]
    ticks = _ticks(chart)
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    spans = zip(chart.steps, chart.spans, strict=False)
    return Drawing(
        chart=chart,
        strokes=tuple(
            _stroke(
                line.label,
                "faint" if line.faint else f"s{_strong(chart, i) % COLOURS}",
                [
                    None if value is None else (x(step), y(value))
                    for step, value in zip(chart.steps, line.values, strict=True)
                ],
                next(value for value in reversed(line.values) if value is not None),
            )
            for i, line in enumerate(chart.lines)
        ),
        x_ticks=tuple((x(step), str(step)) for step in dict.fromkeys((first, last))),
        y_ticks=tuple((y(tick), tick_text(tick)) for tick in ticks),
        whiskers=tuple((x(step), y(span[1]), y(span[0])) for step, span in spans if span),
        limit=y(chart.limit) if chart.limit else None,
    )


def tick_text(tick: float) -> str:
    """A round number in the few characters that an axis has room for."""
    if tick and abs(tick) < 0.001:
        digits, power = f"{tick:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{tick / 1000:g}k" if abs(tick) >= 10_000 else f"{tick:g}"


def _strong(chart: Chart, before: int) -> int:
    return sum(not line.faint for line in chart.lines[:before])


def _stroke(
    label: str, style: str, points: Sequence[tuple[float, float] | None], last: float
) -> Stroke:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    paths = tuple(" ".join(f"{x},{y}" for x, y in piece) for piece in pieces if len(piece) > 1)
    few = sum(map(len, pieces)) <= 12
    dots = tuple(point for piece in pieces if few or len(piece) == 1 for point in piece)
    return Stroke(label, style, paths, dots, last)


def _ticks(chart: Chart) -> list[float]:
    """Three to six round numbers that hold all values; from 0, and to 1 for shares."""
    values = [v for line in chart.lines for v in line.values if v is not None]
    values += [bound for span in chart.spans if span for bound in span]
    if chart.share:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    low, high = min(0.0, *values), max(*values, chart.limit or 0.0)
    if high <= low:
        high = low + 1.0
    step = _round_up((high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _round_up(step: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))
