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
FEW_EVALUATIONS = 2
"""Number of evaluations up to which no line joins them: two points are no trend."""


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
    every: int
    """Number of steps in each column: a line shows their lowest and highest value."""


def draw(chart: Chart) -> Drawing:
    """Return the shapes of a chart that has at least one value."""
    first, last = chart.steps[0], chart.steps[-1]
    ticks = _ticks(chart)
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    parts = columns(len(chart.steps))
    spans = zip(chart.steps, chart.spans, strict=False)
    return Drawing(
        chart=chart,
        strokes=tuple(
            _stroke(
                line.label,
                "faint" if line.faint else f"s{_strong(chart, i) % COLOURS}",
                [
                    [(x(chart.steps[at]), y(line.values[at] or 0.0)) for at in ends]
                    for ends in (extremes(line.values, part) for part in parts)
                ],
                next(value for value in reversed(line.values) if value is not None),
                joined=not chart.spans or len(chart.steps) > FEW_EVALUATIONS,
            )
            for i, line in enumerate(chart.lines)
        ),
        x_ticks=tuple((x(step), tick_text(step)) for step in step_ticks(first, last)),
        y_ticks=tuple((y(tick), tick_text(tick)) for tick in ticks),
        whiskers=tuple((x(step), y(span[1]), y(span[0])) for step, span in spans if span),
        limit=y(chart.limit) if chart.limit else None,
        every=parts[0].stop,
    )


def columns(count: int) -> list[slice]:
    """Divide `count` steps into at most `RIGHT - LEFT` equal parts: one for each unit of width."""
    every = -(-count // (RIGHT - LEFT))
    return [slice(start, min(count, start + every)) for start in range(0, count, every)]


def extremes(values: Sequence[float | None], part: slice) -> list[int]:
    """Return the places of the lowest and the highest value in a part, in order; once if equal."""
    known = [at for at in range(part.start, part.stop) if values[at] is not None]
    if not known:
        return []
    ends = {
        min(known, key=lambda at: values[at] or 0.0),
        max(known, key=lambda at: values[at] or 0.0),
    }
    if len({values[at] for at in ends}) == 1:
        ends = {known[-1]}
    return sorted(ends)


def step_ticks(first: int, last: int) -> list[int]:
    """Return three to six round steps between the first and the last; fewer if there are fewer."""
    if last <= first:
        return [first]
    every = max(1, math.ceil(_round_up((last - first) / 5)))
    return list(range(-(-first // every) * every, last + 1, every))


def tick_text(tick: float) -> str:
    """Format a round number in the few characters that an axis has room for."""
    if tick and abs(tick) < 0.001:
        digits, power = f"{tick:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{tick / 1000:g}k" if abs(tick) >= 10_000 else f"{tick:g}"


def _strong(chart: Chart, before: int) -> int:
    return sum(not line.faint for line in chart.lines[:before])


def _stroke(
    label: str,
    style: str,
    points: Sequence[Sequence[tuple[float, float]]],
    last: float,
    *,
    joined: bool,
) -> Stroke:
    """Return the line through the points of each column; a column without any is a gap."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for column in points:
        if column:
            pieces[-1].extend(column)
        else:
            pieces.append([])
    paths = tuple(" ".join(f"{x},{y}" for x, y in piece) for piece in pieces if len(piece) > 1)
    few = not joined or sum(map(len, pieces)) <= 12
    dots = tuple(point for piece in pieces if few or len(piece) == 1 for point in piece)
    return Stroke(label, style, paths if joined else (), dots, last)


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
