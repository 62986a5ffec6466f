"""The tables of docs/smollm2.md and its picture, from the results in benchmarks/smollm2/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from localrl.interval import wilson
from localrl.runs.logs import read_jsonl

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "smollm2.md"
PICTURE = PAGE.with_suffix(".png")
EXAMPLE = HERE.parent / "examples" / "smollm2"
MARK = "<!-- results -->\n"
"""What stands above it on the page is written by hand, and stays."""
LAST = 5
"""Steps at the end of a trial whose mean reward is told."""

Result = dict[str, Any]


def results(name: str) -> Path:
    """The file of the results of that name."""
    return HERE / "smollm2" / f"{name}.jsonl"


def read(name: str) -> list[Result]:
    """The results so far."""
    path = results(name)
    return list(read_jsonl(path)) if path.exists() else []


def write_page() -> None:
    """Put the tables below the mark, and draw the picture."""
    runs = sorted(read("runs"), key=lambda run: run["seed"])
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = [
        *("## Three seeds", runs_table(runs), f"![Reward and pass@1]({PICTURE.name})"),
        f"Measured on: {runs[0]['machine']}. Made by `benchmarks/smollm2.py`.",
        *("### Before and after", f"```\n{runs[0]['samples'].strip()}\n```"),
        *("## Settings", settings_table(read("settings"))),
        *("## The built-in tasks, before training", tasks_table(read("tasks"))),
    ]
    PAGE.write_text(by_hand + MARK + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    draw(runs, PICTURE)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate(value: float, interval: Sequence[float]) -> str:
    """A share with its interval."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def runs_table(runs: Sequence[Result]) -> str:
    """One row for each seed: as trained, and greedy."""
    head = [
        *("seed", "pass@1 before", "after", "greedy, before", "after"),
        *("steps", "training, s", "command, s", "process, GiB"),
    ]
    rows = []
    for run in runs:
        sides = [run["eval"]["base"], run["eval"]["adapter"]]
        greedy = [run["greedy"][side]["pass@1"] for side in ("base", "with_adapter")]
        rows.append(
            [
                str(run["seed"]),
                *(rate(side["pass@1"], side["ci95"]) for side in sides),
                *(rate(side["rate"], side["ci95"]) for side in greedy),
                str(len(run["reward"])),
                f"{sum(run['step_s']):.0f}",
                f"{run['whole_s']:.0f}",
                f"{run['resident_bytes'] / 2**30:.1f}",
            ]
        )
    return table(head, rows)


def settings_table(trials: Sequence[Result]) -> str:
    """One row for each trial."""
    head = ["trial", f"reward, last {LAST} steps", "greedy pass@1 after", "s a step"]
    rows = [
        [
            trial["trial"],
            f"{mean(trial['reward'][-LAST:]):.2f}",
            rate(trial["eval"]["adapter"]["pass@1"], trial["eval"]["adapter"]["ci95"]),
            f"{mean(trial['step_s']):.1f}",
        ]
        for trial in trials
    ]
    return table(head, rows)


def tasks_table(found: Sequence[Result]) -> str:
    """One row for each task, one column for each temperature."""
    temperatures = sorted({result["temperature"] for result in found})
    head = ["task", *(f"at {t:g}" if t else "greedy" for t in temperatures), "tokens", "cut off"]
    rows = []
    for task in dict.fromkeys(result["task"] for result in found):
        cells = [result for result in found if result["task"] == task]
        cells.sort(key=lambda result: result["temperature"])
        if any("problem" in cell for cell in cells):
            rows.append([f"`{task}`", *["not asked"] * len(temperatures), "", ""])
            continue
        sides = [cell["base"] for cell in cells]
        rows.append(
            [
                f"`{task}`",
                *(rate(side["pass@1"]["rate"], side["pass@1"]["ci95"]) for side in sides),
                f"{sides[0]['mean_completion_tokens']:.0f}",
                f"{sides[0]['cut_off']:.0%}",
            ]
        )
    return table(head, rows)


def draw(runs: Sequence[Result], path: Path) -> None:
    """The reward of each step, and pass@1 on held-out prompts with its intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for run in runs:
        numbers = range(1, len(run["reward"]) + 1)
        line = left.plot(numbers, run["reward"], label=f"seed {run['seed']}")[0]
        points, n = run["evaluations"], run["eval"]["base"]["n"]
        steps, rates = zip(*((p["step"], p["pass@1"]) for p in points), strict=True)
        low, high = zip(*(wilson(round(share * n), n) for share in rates), strict=True)
        right.plot(steps, rates, marker="o", markersize=3)
        right.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    left.set(xlabel="step", ylabel="mean reward of the step", ylim=(0, 1), title="Training")
    right.set(xlabel="step", ylabel="pass@1", ylim=(0, 1), title="Held-out prompts")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
