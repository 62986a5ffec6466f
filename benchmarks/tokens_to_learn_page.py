"""The results on docs/strategies.md and its picture, from the runs of tokens_to_learn.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from learning_arms import ARMS, BASES, SUBJECTS, Arm, Settings, Subject, base_of
from learning_results import (
    HOUR_S,
    MOST_LOAD,
    MOST_WAITED,
    Cost,
    Known,
    Part,
    collect,
    cost,
    curve,
    rate,
    tuning,
)
from learning_runs import COSTS, Job, identity

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
PAIRS = ("pairs", "pairs in larger steps")
"""Of these the first that a task has is compared with besides; the second is the default."""
SEEDS = 5
"""Fewest seeds of an arm that is drawn, if there is one."""
ORDER = ("smollm2", "smollm2-long", "embedded", "choices")
"""Of the subjects on the page: the pretrained model first."""
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


def write(known: Mapping[str, Known], docs: Path = DOCS) -> None:
    """Put the results of the subjects between the page's markers, and draw the picture.

    Raises: ClickException if there are none yet, or if the page lacks its markers.
    """
    parts = {name: list(collect(SUBJECTS[name], known.get(name, {}))) for name in ORDER}
    parts = {name: some for name, some in parts.items() if some}
    if not parts:
        raise click.ClickException("There are no results yet, so the page stays as it is.")
    blocks = [intro(parts)]
    blocks += ["![pass@1 over generated tokens and over seconds](strategies.png)"]
    for name, some in parts.items():
        blocks += section(SUBJECTS[name], some, known[name])
    names = {arm for some in parts.values() for part in some for arm in part.arms}
    blocks += ["### What the arms set", arms_table(names)]
    insert("\n\n".join(blocks), docs / "strategies.md")
    every = [part for some in parts.values() for part in some]
    least = SEEDS if any(pictured(part, SEEDS) for part in every) else 1
    chosen = [(part, arms) for part in every if (arms := pictured(part, least))]
    draw(chosen, docs / "strategies.png")


def pictured(part: Part, least: int) -> list[str]:
    """Return the arms of a task's picture: those with at least so many seeds.

    One arm alone is no picture, unless one seed is enough.
    """
    arms = [arm for arm in COLORS if len(part.arms.get(arm, ())) >= least]
    return arms if len(arms) > 1 or least == 1 else []


# Words and tables


def intro(parts: Mapping[str, Sequence[Part]]) -> str:
    """Return how the figures were made, and what they say of every arm."""
    runs = [run for some in parts.values() for part in some for run in part.runs]
    machines = sorted({run["where"]["machine"] for run in runs})
    days = sorted(time.strftime("%Y-%m-%d", time.gmtime(r["where"]["started"])) for r in runs)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    loud = sum(not part.timed(run) for some in parts.values() for part in some for run in part.runs)
    how = (
        f"Measured {when} on: {'; '.join(machines)}. Made by `benchmarks/tokens_to_learn.py` from\n"
        "the runs in `benchmarks/tokens_to_learn/`. pass@1 is on held-out prompts; a rising curve\n"
        "is fitted to a run's evaluations (pool adjacent violators); the goal is reached where it\n"
        "crosses. Tokens that a strategy samples and discards count. Ratios are paired over\n"
        "seeds: geometric mean and 95 % bootstrap interval. Seconds are those of training steps,\n"
        f"compared between runs on one machine that began within {HOUR_S / 60:.0f} minutes and\n"
        f"had its cores: their threads waited for one at most {MOST_WAITED:.0%} of the time, or,\n"
        f"where that is not known, they began at a load of at most {MOST_LOAD:g} ({loud} of\n"
        f"{len(runs)} runs did not); a processor's seconds in one thread always count. ≥ marks\n"
        "a lower bound: a run that never gets there counts as all it spent. Where that happened\n"
        "to the other arm, a ratio is an upper bound, ≤, and where it happened to both it may lie\n"
        "on either side, ≷. *Slanted* arms are biased: their expected gradient is not that of the\n"
        "sampled groups."
    )
    return f"{how}\n\n{verdict([part for some in parts.values() for part in some])}"


def verdict(parts: Sequence[Part]) -> str:
    """Return which arms are better than flat in small steps on any task, and which are not."""
    names = [arm for arm in ARMS if any(arm in part.arms for part in parts) and arm not in BASES]
    better = {arm: [word for part in parts for word in part.better(arm)] for arm in names}
    won = [f"- {shown(arm)}: {', '.join(words)}" for arm, words in better.items() if words]
    rest = ", ".join(shown(arm) for arm, words in better.items() if not words)
    lines = [f"Better than {BASES[1]}, outside the interval:", "", *(won or ["- none"])]
    return "\n".join([*lines, *(["", f"Not better on any task: {rest}."] if rest else [])])


def section(subject: Subject, parts: Sequence[Part], known: Known) -> list[str]:
    """Return everything about one model."""
    pretrained = subject.name.startswith("smollm2")
    title = "SmolLM2-135M-Instruct" if pretrained else "the embedded model"
    blocks = []
    for part in parts:
        blocks += [f"### `{part.task}` with {title}", best(part), table_of_costs(part)]
        blocks += [f"Spent until {part.goal.goal:g} besides, means over the seeds:", details(part)]
    if len(subject.rates) > 1:
        task = next(iter(subject.tasks))
        blocks += [
            f"Learning rates with {title}: thousands of tokens to the goal on `{task}`, with\n"
            f"seeds of their own ({', '.join(map(str, subject.tuning_seeds))}). The rate with the\n"
            "fewest serves the arm everywhere.",
            rates_table(subject, known),
        ]
    return blocks


def best(part: Part) -> str:
    """Return what the arm with the fewest tokens needs of the base's tokens and seconds."""
    base = base_of(part.arms)
    there = [arm for arm in part.arms if arm not in BASES and not ARMS[arm].removed]
    found = {arm: part.against(arm, base, "tokens") for arm in there}
    means = {arm: each.mean for arm, each in found.items() if each}
    if not means:
        return f"No arm can be compared with {base or BASES[0]} yet."
    arm = min(means, key=lambda name: means[name])
    seconds = part.against(arm, base, part.subject.seconds)
    began = next(iter(part.arms[arm].values()))[0]["evaluations"][0][part.goal.measure]
    kind = " of mean reward" if part.goal.measure == "mean_reward" else ""
    return (
        f"From {began:.2f} to {part.goal.goal:g}{kind}, the fewest tokens are those of"
        f" {shown(arm)}: {found[arm]} of those of {base}, and {seconds or 'an unknown share'} of"
        " its seconds."
    )


def table_of_costs(part: Part) -> str:
    """Return tokens and seconds to the goal, against flat groups in both sizes of steps."""
    rows = []
    axes = ("tokens", part.subject.seconds)
    compared = (*BASES, *[arm for arm in PAIRS if arm in part.arms][:1])
    for arm, seeds in part.arms.items():
        lr = next(iter(seeds.values()))[0]["lr"]
        row = [shown(arm), f"{lr:g}", len(seeds)]
        for axis, scale in zip(axes, (1000, 1), strict=True):
            row += [average(part.costs(arm, axis), scale)]
            row += [_against(part, arm, base, axis) for base in compared]
        rows.append(row)
    words = "seconds" if axes[1] == "wall_s" else "processor seconds"
    heads = ["arm", "lr", "seeds", f"tokens to {part.goal.goal:g}, thousands"]
    heads += [f"of {base}" for base in compared]
    return table([*heads, words, *(f"of {base}" for base in compared)], rows)


def _against(part: Part, arm: str, base: str, axis: str) -> str:
    """Return the ratio to a base arm, and the number of pairs if some seeds have none."""
    if arm == base:
        return "1"
    found = part.against(arm, base, axis)
    if found is None:
        return "-"
    if found.pairs == len(part.arms[arm]):
        return str(found)
    return f"{found}, {found.pairs} pair{'s' * (found.pairs > 1)}"


def details(part: Part) -> str:
    """Return what else runs spent until the goal."""
    rows = [
        [shown(arm), *(average(_known(part, arm, axis)) for axis in COSTS)] for arm in part.arms
    ]
    heads = ["completions", "trained tokens", "prompt positions", "forward calls", "wall, s"]
    return table(["arm", *heads], rows)


def _known(part: Part, arm: str, axis: str) -> list[Cost]:
    """Return the costs of runs that say them; a runner outside counts no forward calls."""
    runs = [each[0] for each in part.arms[arm].values()]
    runs = [run for run in runs if all(e.get(axis) is not None for e in run["evaluations"])]
    return [cost(run, part.goal.goal, axis) for run in runs]


def rates_table(subject: Subject, known: Known) -> str:
    """Return tokens to the goal by learning rate, of each tuned arm."""
    rows = []
    for arm in ARMS:
        jobs = tuning(subject, arm)
        if not jobs or rate(subject, arm, known) is None:
            continue
        cells = []
        for lr in subject.rates:
            runs = [known[identity(job.record)][0] for job in jobs if job.lr == lr]
            cells.append(average([cost(run, jobs[0].goal.goal) for run in runs], 1000))
        rows.append([shown(arm), *cells])
    return table(["arm", *(f"lr {lr:g}" for lr in subject.rates)], rows)


def arms_table(names: set[str]) -> str:
    """Return what each arm sets over the first one, and whose it is."""
    first: Settings = Job.of(SUBJECTS["embedded"], "steps", BASES[0], 0.0, 0).settings
    rows = [
        [
            shown(name),
            _whose(arm),
            words({k: v for k, v in arm.settings.items() if first.get(k) != v}),
        ]
        for name, arm in ARMS.items()
        if name in names
    ]
    return table(["arm", "whose", f"settings other than {BASES[0]}'s"], rows)


def _whose(arm: Arm) -> str:
    paper = f"arXiv {arm.paper}" if arm.paper[:1].isdigit() else arm.paper or "localrl"
    return paper + (f", {arm.rival}" if arm.rival else "")


def shown(arm: str) -> str:
    """Return an arm's name, slanted if it is biased, and that it was removed if it was."""
    name = f"*{arm}*" if ARMS[arm].biased else arm
    return f"{name} (removed)" if ARMS[arm].removed else name


def words(settings: Mapping[str, Any]) -> str:
    """Return settings as they are given to `--set`."""
    return ", ".join(f"`{key}={value}`" for key, value in settings.items())


def average(costs: Sequence[Cost], scale: float = 1.0) -> str:
    """Return the mean, marked when it is a lower bound."""
    if not costs:
        return "-"
    mean = float(np.mean([each.value for each in costs])) / scale
    number = f"{mean:,.1f}" if mean < 10 else f"{mean:,.0f}"
    return ("≥ " if any(each.bound for each in costs) else "") + number


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def insert(text: str, page: Path) -> None:
    """Put text between the page's markers; what a person wrote around them stays.

    Raises: ClickException for a page without them.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Strategies\n\n{BEGIN}\n{END}\n"
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{page} lacks the lines {BEGIN} and {END}.")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


# The picture


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
