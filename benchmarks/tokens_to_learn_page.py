"""The results in docs/strategies.md and strategies-tables.md, from tokens_to_learn.py's runs."""

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
    SEEDS,
    Cost,
    Known,
    Part,
    Ratio,
    collect,
    cost,
    rate,
    ratio,
    tuning,
)
from learning_runs import COSTS, Job, identity
from tokens_to_learn_picture import picture

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
PAIRS = ("pairs", "pairs in larger steps")
"""Of these the first that a task has is compared with besides; the second is the default."""
ORDER = ("smollm2", "smollm2-long", "embedded", "choices")
"""Of the subjects on the page: the pretrained model first."""


def write(known: Mapping[str, Known], docs: Path = DOCS) -> None:
    """Put the results of the subjects between the pages' markers, and draw the picture.

    Raises: ClickException if there are none yet, or if a page lacks its markers.
    """
    parts = {name: list(collect(SUBJECTS[name], known.get(name, {}))) for name in ORDER}
    parts = {name: some for name, some in parts.items() if some}
    if not parts:
        raise click.ClickException("There are no results yet, so the page stays as it is.")
    every = [part for some in parts.values() for part in some]
    blocks = ["![pass@1 over generated tokens and over seconds](strategies.png)", intro(every)]
    for some in parts.values():
        blocks += together(some)
        for part in some:
            blocks += [title(part), best(part), summary(part)]
    insert(blocks, docs / "strategies.md")
    insert([verdict(every), *in_full(parts, known)], docs / "strategies-tables.md")
    picture(every, docs / "strategies.png")


# Words and tables


def intro(parts: Sequence[Part]) -> str:
    """Return how the figures were made."""
    runs = [run for part in parts for run in part.runs]
    machines = sorted({run["where"]["machine"] for run in runs})
    days = sorted(time.strftime("%Y-%m-%d", time.gmtime(r["where"]["started"])) for r in runs)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    loud = sum(not part.timed(run) for part in parts for run in part.runs)
    return (
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


def verdict(parts: Sequence[Part]) -> str:
    """Return which arms are better than flat in small steps on any task, and which are not."""
    names = [arm for arm in ARMS if any(arm in part.arms for part in parts) and arm not in BASES]
    better = {arm: [word for part in parts for word in part.better(arm)] for arm in names}
    won = [f"- {shown(arm)}: {', '.join(words)}" for arm, words in better.items() if words]
    rest = ", ".join(shown(arm) for arm, words in better.items() if not words)
    lines = [f"Better than {BASES[1]}, outside the interval:", "", *(won or ["- none"])]
    return "\n".join([*lines, *(["", f"Not better on any task: {rest}."] if rest else [])])


def in_full(parts: Mapping[str, Sequence[Part]], known: Mapping[str, Known]) -> list[str]:
    """Return all tables: what the arms spend, set, and which learning rates they were given."""
    blocks = []
    for name, some in parts.items():
        for part in some:
            blocks += [title(part), table_of_costs(part)]
            blocks += [f"Spent until {part.goal.goal:g} besides, means over the seeds:"]
            blocks += [details(part)]
        blocks += learning_rates(SUBJECTS[name], known[name])
    names = {arm for some in parts.values() for part in some for arm in part.arms}
    return [*blocks, "## What the arms set", arms_table(names)]


def title(part: Part) -> str:
    """Return the heading of a task."""
    return f"### `{part.task}` with {model(part.subject)}"


def model(subject: Subject) -> str:
    """Return the name of a subject's model."""
    return "SmolLM2-135M-Instruct" if subject.name.startswith("smollm2") else "the embedded model"


def learning_rates(subject: Subject, known: Known) -> list[str]:
    """Return how the rates of a subject's arms were found."""
    if len(subject.rates) == 1:
        return []
    task, seeds = next(iter(subject.tasks)), ", ".join(map(str, subject.tuning_seeds))
    return [
        f"### Learning rates of `{task}`",
        f"Thousands of tokens to the goal with {model(subject)}, seeds of their own ({seeds}).\n"
        "The rate with the fewest serves the arm in all of the model's tasks above.",
        rates_table(subject, known),
    ]


def together(parts: Sequence[Part]) -> list[str]:
    """Return what the arms need of the base, over the seeds of all tasks; nothing for one task."""
    if len(parts) == 1:
        return []
    base, axes = base_of(parts[0].arms), ("tokens", parts[0].subject.seconds)
    rows = []
    for arm in parts[0].arms:
        if arm == base or ARMS[arm].removed:
            continue
        both = [[part.pairs(arm, base, axis) for part in parts] for axis in axes]
        if all(len(each) >= SEEDS for each in both[0]):
            found = [ratio([pair for each in some for pair in each]) for some in both]
            rows.append([shown(arm), *(_counted(r, len(parts) * SEEDS) for r in found)])
    if not rows:
        return []
    names = " and ".join(f"`{part.task}`" for part in parts)
    return [
        f"### {names} together, with {model(parts[0].subject)}",
        f"Ratios over the seeds of all tasks, of arms with {SEEDS} seeds of each:",
        table(["arm", f"tokens, of {base}", f"seconds, of {base}"], rows),
    ]


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


def summary(part: Part) -> str:
    """Return tokens and seconds to the goal of the arms that there are, against the base."""
    arms = [arm for arm in part.arms if not ARMS[arm].removed]
    return _costs(part, arms, [base_of(part.arms) or BASES[0]])


def table_of_costs(part: Part) -> str:
    """Return those of all arms, against flat groups in both sizes of steps and against pairs."""
    compared = [arm for arm in BASES if arm in part.arms]
    return _costs(part, list(part.arms), compared + [a for a in PAIRS if a in part.arms][:1])


def _costs(part: Part, arms: Sequence[str], compared: Sequence[str]) -> str:
    """Return a row of costs for each arm, as ratios to each of those that it is compared with."""
    rows = []
    axes = ("tokens", part.subject.seconds)
    for arm in arms:
        seeds = part.arms[arm]
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
    return _counted(part.against(arm, base, axis), len(part.arms[arm]))


def _counted(found: Ratio | None, pairs: int) -> str:
    """Return a ratio, with the number of its pairs if there could be more."""
    if found is None:
        return "-"
    if found.pairs == pairs:
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


def insert(blocks: Sequence[str], page: Path) -> None:
    """Put blocks of text between the page's markers; what a person wrote around them stays.

    Raises: ClickException for a page without them.
    """
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Strategies\n\n{BEGIN}\n{END}\n"
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{page} lacks the lines {BEGIN} and {END}.")
    text = "\n\n".join(blocks)
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")
