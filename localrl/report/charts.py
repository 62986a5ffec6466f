"""Charts as shapes: the numbers from which the page's SVG is written.

The shapes are computed here, not by a charting library. A library that draws in the browser would
have to be kept in this repository as a minified file, be copied into every report, and show nothing
without its script; a report only needs lines, two axes and a limit. The template escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from localrl.report.curves import Chart

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 156
"""Edges of the drawing area, in SVG coordinates."""
COLOURS = 5


@dataclass(frozen=True)
class Stroke:
    """A line with its gaps."""

    label: str
    style: str
    paths: tuple[str, ...]
    """Polyline `points`, one string for each piece without a gap."""
    dots: tuple[tuple[float, float], ...]
    """Isolated values, or all values of a line that has few."""
    last: float


@dataclass(frozen=True)
class Drawing:
    """A chart, ready to be written."""

    chart: Chart
    strokes: tuple[Stroke, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    whiskers: tuple[tuple[float, float, float], ...]
    """x, upper end and lower end of each interval."""
    limit: float | None
    """Height of the limit line."""


def draw(chart: Chart) -> Drawing:
    """Return the shapes of a chart that has at least one value."""
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
    """Format a round number in the few characters that an axis has room for."""
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
    """Return three to six round numbers that span all values; from 0, and up to 1 for shares."""
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
    """Round up to 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))
