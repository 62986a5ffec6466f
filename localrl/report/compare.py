"""Compares two runs side by side, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from localrl.report import facts
from localrl.report.curves import column, mean, sparkline, tokens_so_far
from localrl.report.reading import Run
from localrl.report.verdict import compare
from localrl.runs.metrics import METRICS
from localrl.utils.text import one_line

LABEL, COLUMN = 36, 20
PLACE = ("run.out",)
"""Settings that say where a run is stored, not what it does."""
CURVES = ("reward", "entropy", "completions/mean_length", "kl", "update/drift", "step_time")
NUMBERS = (
    "reward",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "update/drift",
    "grad_norm",
    "rollout/tokens",
    "update/trained_tokens",
    "time/rollout_s",
    "time/update_s",
    "step_time",
)
LAST = 5
"""Number of last steps whose mean is shown."""


def comparison(one: Run, other: Run, width: int = 80) -> Iterator[str]:
    """Compare states, evaluations, settings, last steps, and curves over steps and tokens."""
    yield one_line(f"A is {one.path}, B is {other.path}")
    yield _row("", "A", "B")
    yield _row("state", *(f"{run.state}, step {run.step}" for run in (one, other)))
    yield _row("model", facts.model(one), facts.model(other))
    yield _row("task", *(str(run.settings.get("task.name", "unknown")) for run in (one, other)))
    yield _row("tokens sampled", *map(_tokens, (one, other)))
    yield _row("seconds of steps", *map(_seconds, (one, other)))
    yield from _evaluations(one, other)
    yield from _settings(one, other)
    yield f"\nmean of the last {LAST} steps"
    for key in NUMBERS:
        values = [mean(column(run.steps[-LAST:], key)) for run in (one, other)]
        if any(value is not None for value in values):
            unit = METRICS[key][0]
            name = f"  {key}" + (f" ({unit})" if unit not in ("", "reward") else "")
            yield _row(name, *map(facts.number, values))
    yield from _curves(one, other, width)


def differing(one: Run, other: Run) -> list[tuple[str, str, str]]:
    """Return the settings that differ, by name."""
    names = sorted({*one.settings, *other.settings} - {*PLACE})
    pairs = [(n, one.settings.get(n, "unset"), other.settings.get(n, "unset")) for n in names]
    return [(name, str(a), str(b)) for name, a, b in pairs if a != b]


def _evaluations(one: Run, other: Run) -> Iterator[str]:
    yield "\nheld-out prompts"
    for name, place in (("first", 0), ("last", -1)):
        cells = []
        for run in (one, other):
            score = run.scores[place] if run.scores else None
            if score is None or score.interval is None:
                cells.append("unknown")
            else:
                low, high = score.interval
                cells.append(f"{facts.number(score.pass_at_1)} ({low:.3f} to {high:.3f})")
        yield _row(f"  {name} pass@1 (95 %)", *cells)
    if one.scores and other.scores:
        yield _row("  prompts", *(str(run.scores[-1].n) for run in (one, other)))
        yield "  " + _difference(one, other)


def _difference(one: Run, other: Run) -> str:
    if one.settings.get("task.name") != other.settings.get("task.name"):
        return "Cannot tell which is better: the tasks differ."
    names = ("A", "B")
    return compare(one.scores[-1], other.scores[-1], names)


def _settings(one: Run, other: Run) -> Iterator[str]:
    rows = differing(one, other)
    yield "\nsettings that differ" if rows else "\nno settings differ"
    for name, a, b in rows:
        yield _row(f"  {name}", a, b)


def _curves(one: Run, other: Run, width: int) -> Iterator[str]:
    room = max(10, width - 26)
    for axis in ("steps", "tokens"):
        ends = [_end(run, axis) for run in (one, other)]
        if not all(ends):
            continue
        yield f"\ncurves over {axis}, 0 to {facts.number(int(max(ends)))}"
        for key in CURVES:
            values = [column(run.steps, key) for run in (one, other)]
            known = [v for line in values for v in line if v is not None]
            if not known:
                continue
            low, high = min(known), max(known)
            yield f"  {key}, {low:.3g} to {high:.3g}"
            for run, line, name in zip((one, other), values, "AB", strict=True):
                spread = _over(_positions(run, axis), line, max(ends), room)
                yield f"    {name} {sparkline(spread, room, low, high)}".rstrip()


def _end(run: Run, axis: str) -> float:
    return max(_positions(run, axis), default=0)


def _positions(run: Run, axis: str) -> list[float]:
    return [s["step"] for s in run.steps] if axis == "steps" else tokens_so_far(run.steps)


def _over(
    positions: Sequence[float], values: Sequence[float | None], end: float, room: int
) -> list[float | None]:
    """Return the values as `room` cells from 0 to `end`, each the mean of the values in it.

    A cell between two steps has the value of the later one: the steps of one run may be longer.
    """
    cells: list[list[float | None]] = [[] for _ in range(room)]
    start = 0
    for position, value in zip(positions, values, strict=True):
        stop = min(room, max(start + 1, round(position / end * room)))
        for cell in range(min(start, room - 1), stop):
            cells[cell].append(value)
        start = stop
    return [mean(cell) for cell in cells]


def _tokens(run: Run) -> str:
    return facts.number(run.steps[-1].get("num_tokens") if run.steps else None)


def _seconds(run: Run) -> str:
    known = [value for value in column(run.steps, "step_time") if value is not None]
    return facts.number(sum(known)) if known else "unknown"


def _row(name: str, *cells: str) -> str:
    shown = "".join(f"{one_line(cell):{COLUMN}}  " for cell in cells)
    return f"{one_line(name):{LABEL - 1}} {shown}".rstrip()
