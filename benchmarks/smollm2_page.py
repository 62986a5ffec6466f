"""The tables of docs/smollm2.md and its picture, from the results in benchmarks/smollm2/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from localrl.runs.logs import read_jsonl
from localrl.utils.intervals import wilson

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "smollm2.md"
PICTURE = PAGE.with_suffix(".png")
EXAMPLE = HERE.parent / "examples" / "smollm2"
MARK = "<!-- results -->\n"
"""What stands above it on the page is written by hand, and stays."""
TITLES = {"train.toml": "Facts as JSON", "sums.toml": "Sums"}
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
    by_file = {file: [run for run in runs if run["file"] == file] for file in TITLES}
    by_file = {file: some for file, some in by_file.items() if some}
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = ["## Three seeds", f"![Reward and pass@1 by step]({PICTURE.name})"]
    for file, some in by_file.items():
        parts += [f"### {TITLES[file]} (`{file}`)", runs_table(some)]
        parts += [f"Seed {some[0]['seed']}, before and after:", f"```\n{some[0]['samples']}\n```"]
    if trials := read("settings"):
        parts += ["## Settings", *settings_tables(trials)]
    if tasks := read("tasks"):
        parts += ["## The built-in tasks, before training", tasks_table(tasks)]
    parts += [f"Measured on: {runs[0]['machine']}. Made by `benchmarks/smollm2.py`."]
    PAGE.write_text(by_hand + MARK + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    draw(by_file, PICTURE)


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


def settings_tables(trials: Sequence[Result]) -> list[str]:
    """For each task one row for each trial."""
    head = ["trial", f"reward, last {LAST} steps", "greedy pass@1 after"]
    parts = []
    for file in dict.fromkeys(trial["file"] for trial in trials):
        some = [trial for trial in trials if trial["file"] == file]
        base = some[0]["eval"]["base"]
        rows = [
            [
                trial["trial"],
                f"{mean(trial['reward'][-LAST:]):.2f}",
                rate(trial["eval"]["adapter"]["pass@1"], trial["eval"]["adapter"]["ci95"]),
            ]
            for trial in some
        ]
        before = f"{TITLES[file]}: greedy pass@1 before {rate(base['pass@1'], base['ci95'])}"
        parts += [before, table(head, rows)]
    return parts


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


def draw(by_file: Mapping[str, Sequence[Result]], path: Path) -> None:
    """The reward of each step, and pass@1 on held-out prompts with its intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(by_file)
    figure, [panels] = pyplot.subplots(
        1, columns, figsize=(4.5 * columns, 3.4), squeeze=False, constrained_layout=True
    )
    for axes, (file, runs) in zip(panels, by_file.items(), strict=True):
        for run in runs:
            points, n = run["evaluations"], run["eval"]["base"]["n"]
            steps, rates = zip(*((p["step"], p["pass@1"]) for p in points), strict=True)
            low, high = zip(*(wilson(round(share * n), n) for share in rates), strict=True)
            line = axes.plot(steps, rates, marker="o", ms=4, label=f"seed {run['seed']}")[0]
            axes.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
            numbers = range(1, len(run["reward"]) + 1)
            axes.plot(numbers, run["reward"], lw=0.8, alpha=0.5, color=line.get_color())
        axes.set(xlabel="step", ylim=(0, 1), title=TITLES[file])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("pass@1, held out (thick)\nreward of the step (thin)")
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
