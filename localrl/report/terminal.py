"""Shows a run in the terminal, as lines of text without control characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from localrl.report import facts
from localrl.report.curves import Chart, charts, sparkline
from localrl.report.reading import Run, read_groups, read_groups_at
from localrl.report.verdict import verdict
from localrl.utils.text import one_line, printable

LABEL = 29
KEYS = (
    "reward",
    "rollout/informative_groups",
    "entropy",
    "completions/mean_length",
    "kl",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "step_time",
    "memory/peak_bytes",
)
"""Metrics of the last step that are shown."""


def overview(run: Run, width: int = 80) -> Iterator[str]:
    """Yield status, evaluation, warnings, curves and the last step, line by line."""
    yield _row("run", f"{run.path}, {facts.state(run)}")
    yield _row("model", facts.model(run))
    if run.supervised:
        yield _row("worked examples", str(run.settings["task.demonstrations"]))
    yield _row("task", str(run.settings.get("task.name", "unknown")))
    for score in facts.first_and_last(run):
        yield _row(facts.moment(score), facts.score_words(score))
    yield _row("learned?", verdict(run))
    for warning in facts.warnings(run):
        yield _row("warning", warning)
    if not run.steps:
        yield "\nno steps yet"
        return
    yield f"\ncurves over steps {run.steps[0]['step']} to {run.step}: lowest, curve, highest, last"
    for chart in charts(run):
        yield from curve(chart, max(10, width - LABEL - 32))
    yield f"\nstep {run.step}"
    for key in ("loss", *KEYS) if run.supervised else KEYS:
        if run.steps[-1].get(key) is not None:
            yield _row("  " + key, facts.with_unit(key, run.steps[-1][key]))


def curve(chart: Chart, width: int) -> Iterator[str]:
    """Draw the lines of a chart as rows of blocks, each scaled from its lowest to highest value."""
    for line in chart.lines:
        known = [value for value in line.values if value is not None]
        if line.faint and len(chart.lines) > 1:
            continue
        low, high = min(known), max(known)
        blocks = sparkline(line.values, width, low, high)
        name = chart.title if len(chart.lines) == 1 else f"{chart.title}, {line.label}"
        unit = f" {chart.unit}" if chart.unit else ""
        yield (
            f"{one_line(name, LABEL):{LABEL}}{_short(low):>9} {blocks} {_short(high):<8} "
            f"{_short(known[-1])}{unit}"
        ).rstrip()


def samples(run: Run) -> Iterator[str]:
    """Yield every group, last first: prompt, completions, rewards, and what was learned from."""
    offsets = [offset for offset, _ in read_groups(run.path)]
    if not offsets:
        yield f"{run.path} has no rollouts yet.\n"
        return
    for record in read_groups_at(run.path, offsets[::-1]):
        if record is not None:
            yield from (line + "\n" for line in _group(record))


def _group(record: Mapping[str, Any]) -> Iterator[str]:
    fate = "learned from" if record.get("kept") else f"not learned from: {record.get('reason')}"
    yield f"step {record.get('step')}  {one_line(str(record.get('example')))}  {fate}"
    for message in record["messages"]:
        if isinstance(message, dict):
            role, content = (str(message.get(name)) for name in ("role", "content"))
            yield f"  {one_line(role)}: {printable(content)}"
    for leaf in record["leaves"]:
        yield f"  {_leaf_head(leaf)}"
        yield "    " + printable(_spoken(leaf)).replace("\n", "\n    ")
        for name, value in (leaf.get("extra") or {}).items():
            if value is not None:
                yield f"    [{one_line(name)}] " + printable(str(value)).replace("\n", "\n      ")
    yield ""


def _leaf_head(leaf: Mapping[str, Any]) -> str:
    parts = leaf.get("parts") or {}
    shown = ", ".join(f"{name} {facts.number(value)}" for name, value in parts.items())
    reward = facts.number(leaf.get("reward"))
    why = f"; not learned from: {leaf['dropped']}" if leaf.get("dropped") else "; learned from"
    scored = f"reward {reward} ({shown}); " if parts else ""  # given completions have none
    return one_line(f"{scored}ended by {leaf.get('finish_reason')}{why}")


def _spoken(leaf: Mapping[str, Any]) -> str:
    """Return the completion, with all its turns if there are several."""
    turns = [m for m in leaf.get("messages") or () if isinstance(m, dict)]
    if turns:
        return "\n".join(f"{m.get('role')}: {m.get('content') or ''}" for m in turns)
    return str(leaf.get("text", ""))


def _row(name: str, text: str) -> str:
    return f"{one_line(name):{LABEL - 1}} {one_line(text)}"


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
