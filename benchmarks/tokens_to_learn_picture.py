"""The picture of docs/strategies.md, from the runs of tokens_to_learn.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learning_results import Part, curve

SEEDS = 5
"""Fewest seeds of an arm that is drawn, if there is one."""
COLORS = {
    "flat-8": "#666666",
    "flat-8 in small steps": "#E69F00",
    "pairs": "#009E73",
    "pairs in larger steps": "#A6761D",
    "pairs in mini-batches": "#D55E00",
    "2-GRPO in small steps": "#0072B2",
    "CPPO in small steps": "#CC79A7",
    "shown answer": "#56B4E9",
    "taught": "#882255",
    "worked examples": "#000000",
}
"""The arms in the picture."""


def picture(parts: Sequence[Part], path: Path) -> None:
    """Draw the tasks whose arms have enough seeds, or all tasks if none has."""
    least = SEEDS if any(pictured(part, SEEDS) for part in parts) else 1
    draw([(part, arms) for part in parts if (arms := pictured(part, least))], path)


def pictured(part: Part, least: int) -> list[str]:
    """Return the arms of a task's picture: those with at least so many seeds.

    One arm alone is no picture, unless one seed is enough.
    """
    arms = [arm for arm in COLORS if len(part.arms.get(arm, ())) >= least]
    return arms if len(arms) > 1 or least == 1 else []


def draw(parts: Sequence[tuple[Part, Sequence[str]]], path: Path) -> None:
    """Draw the measure over tokens and over seconds, a row for each task with its arms.

    Lines are means over seeds, bands their range.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (10, 3.4 * len(parts))
    figure, rows = pyplot.subplots(
        len(parts), 2, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for (part, arms), panels in zip(parts, rows, strict=True):
        seconds, model = part.subject.seconds, part.subject.name
        for axes, (axis, scale) in zip(panels, (("tokens", 1000), (seconds, 1)), strict=True):
            for arm in arms:
                _line(axes, part, arm, axis, scale)
            axes.axhline(part.goal.goal, color="black", lw=0.8, ls=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set(ylim=(0, 1), xlim=(0, None))
        panels[0].set(
            xlabel="tokens, thousands", ylabel=f"{part.goal.measure}, {part.task}, {model}"
        )
        kind = "processor seconds" if seconds == "cpu_s" else "seconds"
        panels[1].set(xlabel=f"{kind} of training")
    lines = {line.get_label(): line for axes in rows.flat for line in axes.get_lines()}
    known = [arm for arm in COLORS if arm in lines]
    handles = [lines[arm] for arm in known]
    figure.legend(handles, known, frameon=False, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axes: Any, part: Part, arm: str, axis: str, scale: float) -> None:
    """Draw an arm as far as all of its seeds go; seconds of quiet runs only."""
    runs = [
        run
        for each in part.arms[arm].values()
        for run in each[:1]
        if axis == "tokens" or part.timed(run)
    ]
    if not runs:
        return
    curves = [curve(run, axis) for run in runs]
    grid = np.linspace(0, min(spent[-1] for spent, _ in curves), 200)
    lines = np.array([np.interp(grid, *each) for each in curves])
    axes.plot(grid / scale, lines.mean(axis=0), color=COLORS[arm], label=arm, lw=1.8)
    band = (lines.min(axis=0), lines.max(axis=0))
    axes.fill_between(grid / scale, *band, color=COLORS[arm], alpha=0.12, lw=0)
