"""What teaches at the fewest generated tokens: the rollout strategies, at equal token budgets.

    python benchmarks/strategies.py all --machine "two x86-64 cores"     # tune, run, page
    python benchmarks/strategies.py run --tune --seeds 0,1 --arms "flat,adaptive" --jobs 2
    python benchmarks/strategies.py page --machine "two x86-64 cores"
    python benchmarks/strategies.py one --arm flat --lr 6e-4 --seed 0 --task steps

Each arm, learning rate, seed and task is one run on the demonstration's settings, in a process of
its own, evaluated on the same held-out prompts. A run that is in the results already, with the
settings that its arm has now, is not made again. A token that several completions share was
generated once and counts once.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from localrl.config import RunConfig
from localrl.errors import LocalRLError
from localrl.runs.logs import JsonLines, read_jsonl


@dataclass(frozen=True)
class Arm:
    """What an arm sets over `BASE`, and the most tokens that its runs generate."""

    settings: dict[str, Any] = field(default_factory=dict)
    budget: int = 20_000


BASE = {
    "task.train_prompts": 64,
    "rollout.strategy": "flat",
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 8,
    "rollout.prompt_order": "shuffled",
    "rollout.replay_groups": 0,
    "rollout.reuse": 0.0,
    "learning.keep_completions": 0,
    "learning.min_advantage": 0.0,
    "learning.kappa": 0.0,
    "learning.warmup_steps": 2,
}
"""Said in full, so that arms stay what they are when defaults change."""


def small(prompts: int, **settings: Any) -> Arm:
    """An arm with the tracker, and so many prompts that a step has about 600 tokens."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return Arm({"rollout.prompts_per_step": prompts, "learning.kappa": 4.0} | given)


SINGLE = {"rollout__group_size": 1}
ADAPTIVE = {"rollout__strategy": "adaptive"}
TREE = {"rollout__strategy": "tree", "rollout__fork_rule": "periodic"}
THOMPSON = {"rollout__prompt_order": "thompson"}
PAIRS = {"rollout__group_size": 2}
ADAPTIVE_TREE = TREE | {"rollout__strategy": "adaptive-tree"}
ARMS = {
    "flat": Arm(budget=40_000),
    "flat in small steps": Arm({"rollout.prompts_per_step": 4}),
    "flat in smaller steps": Arm({"rollout.prompts_per_step": 2}),
    "flat with tracker": small(2),
    "pairs": small(8, **PAIRS),
    "pairs in larger steps": small(16, **PAIRS),
    "single": small(16, **SINGLE),
    "single + thompson": small(16, **SINGLE, **THOMPSON),
    "adaptive": small(4, **ADAPTIVE),
    "adaptive + thompson": small(4, **ADAPTIVE, **THOMPSON),
    "tree by entropy": small(3, **TREE | {"rollout__fork_rule": "entropy"}),
    "tree by period": small(3, **TREE),
    "adaptive-tree": small(3, **ADAPTIVE_TREE),
    "adaptive-tree + thompson": small(3, **ADAPTIVE_TREE, **THOMPSON),
    "tracker + down-sampling": small(2, learning__keep_completions=4),
    "pairs + replay": small(8, **PAIRS, rollout__replay_groups=4),
    "pairs + reuse": small(8, **PAIRS, rollout__reuse=0.5),
}
"""Names without commas: options separate them so."""
COLORS = {
    "flat": "#666666",
    "flat in smaller steps": "#E69F00",
    "adaptive": "#56B4E9",
    "tree by period": "#0072B2",
    "pairs": "#009E73",
    "pairs + reuse": "#D55E00",
}
"""The arms in the picture."""
LEARNING_RATES = (1.2e-3, 2.4e-3, 4.8e-3)
TUNING_SEEDS = (100, 101)
TASKS = ("steps", "sorting")
"""The main task, on which learning rates are tuned and which is drawn, and the others."""
GOAL = 0.85
STOP = 0.9
"""A run ends when two evaluations in a row are above this."""
MARK = 6_000
BASES = ("flat", "flat in smaller steps")
"""What arms are compared with; the second says what is not merely the size of the steps."""
COSTS = ("rollouts", "trained_tokens", "prefill_positions", "forward_calls", "wall_s")
RESAMPLES = 10_000
BEGIN, END = "<!-- results -->", "<!-- end of results -->"

Run = dict[str, Any]
"""A line of results.jsonl: the job's fields, its settings, `evaluations`, and how it `ended`."""
Curve = tuple[np.ndarray, np.ndarray]
"""What was spent, of one kind, and pass@1, at each evaluation."""


@dataclass(frozen=True)
class Job:
    """One run to make."""

    task: str
    arm: str
    lr: float
    seed: int
    budget: int
    every: int
    prompts: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the run sets over the demonstration."""
        return {
            **BASE,
            **ARMS[self.arm].settings,
            "task.name": self.task,
            "task.eval_prompts": self.prompts,
            "learning.lr": self.lr,
            "run.seed": self.seed,
            "memory.threads": 1,
        }

    @property
    def record(self) -> Run:
        """The head of the run's line."""
        return {**asdict(self), "settings": self.settings}

    @property
    def name(self) -> str:
        """A file name."""
        arm = "".join(c if c.isalnum() else "-" for c in self.arm).strip("-")
        return f"{self.task}-{arm}-{self.lr:g}-{self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where results are, and the sizes of the runs."""

    out: Path
    docs: Path
    tokens: int | None
    every: int
    prompts: int

    @property
    def file(self) -> Path:
        """The results, one line per run."""
        return self.out / "results.jsonl"

    def job(self, task: str, arm: str, lr: float, seed: int) -> Job:
        """The run of these sizes."""
        budget = min(ARMS[arm].budget, self.tokens or ARMS[arm].budget)
        return Job(task, arm, lr, seed, budget, self.every, self.prompts)

    def known(self) -> dict[str, Run]:
        """The runs there are, by `identity`; of two alike the later."""
        lines = read_jsonl(self.file) if self.file.exists() else ()
        return {identity(line): line for line in lines}


def identity(run: Run) -> str:
    """What tells a run from others: every field of its job, and all settings."""
    fields = (*Job.__dataclass_fields__, "settings")
    return json.dumps({name: run.get(name) for name in fields}, sort_keys=True)


def missing(jobs: Sequence[Job], known: dict[str, Run]) -> list[Job]:
    """The jobs that have not been done, in order."""
    return [job for job in jobs if identity(job.record) not in known]


# One run


class Clock:
    """Wall and processor seconds of this process, in training steps alone."""

    wall_s = cpu_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu


def make(job: Job, out: Path) -> Run:
    """Train and evaluate; metrics.jsonl is kept, the rest of the run folder is not."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "run"
        evaluations, ended = learn(job, folder)
        add_costs(evaluations, folder)
        (out / "metrics").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "metrics.jsonl", out / "metrics" / f"{job.name}.jsonl")
    return {**job.record, "ended": ended, "evaluations": evaluations}


def learn(job: Job, folder: Path) -> tuple[list[Run], str]:
    """The evaluations of one run, and why it ended."""
    from localrl.processes.heartbeat import Heartbeat
    from localrl.train import train_step
    from localrl.training.session import NullProgress
    from localrl.training.setup import open_session

    settings = {"run.out": str(folder), "run.rollout_log_limit": 10**12, **job.settings}
    config, clock, step = RunConfig.create(settings), Clock(), 0
    opened = open_session(
        config, overwrite=False, resume=False, progress=NullProgress(), heartbeat=Heartbeat()
    )
    with opened as session:

        def evaluate() -> Run:
            found = session.evaluate(step)
            return {
                "step": step,
                "tokens": session.tokens,
                "wall_s": clock.wall_s,
                "cpu_s": clock.cpu_s,
                "pass@1": found.pass_at_1,
                "mean_completion_tokens": found.mean_completion_tokens,
            }

        evaluations = [evaluate()]
        while session.tokens < job.budget:
            step += 1
            try:
                with clock.running():
                    train_step(session, step)
            except LocalRLError as error:
                if error.exit_code != LocalRLError.exit_code:
                    raise  # only a diverged adapter is a result
                return evaluations, str(error)
            passed = session.tokens // job.every > evaluations[-1]["tokens"] // job.every
            if passed or session.tokens >= job.budget:
                evaluations.append(evaluate())
                if all((each["pass@1"] or 0) > STOP for each in evaluations[-2:]):
                    return evaluations, "learned"
    return evaluations, "budget"


def add_costs(evaluations: Sequence[Run], folder: Path) -> None:
    """Give each evaluation what had been spent by then; null where the metrics do not say it.

    A completion that is replayed is scored once, in the step that sampled it.
    """
    spent: dict[str, dict[int, float]] = defaultdict(dict)
    for line in read_jsonl(folder / "metrics.jsonl"):
        for name in ("update/trained_tokens", "rollout/prefill_positions", "rollout/forward_calls"):
            if line.get(name) is not None:
                spent[name.partition("/")[2]][line["step"]] = line[name]
    for line in read_jsonl(folder / "rollouts.jsonl"):
        steps = spent["rollouts"]
        steps[line["step"]] = steps.get(line["step"], 0) + len(line["leaves"])
    for each in evaluations:
        for name in COSTS[:-1]:
            counts = [n for step, n in spent[name].items() if step <= each["step"]]
            each[name] = sum(counts) if spent[name] else None


# Scheduling


def schedule(bench: Bench, jobs: Sequence[Job], at_once: int) -> None:
    """Make the missing runs, some at once, each in a process of its own.

    Raises: ClickException, after all others are made, when one failed.
    """
    todo = missing(jobs, bench.known())
    click.echo(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there.")
    with ThreadPoolExecutor(at_once) as pool:
        failed = sum(not made for made in pool.map(lambda job: start(bench, job), todo))
    if failed:
        raise click.ClickException(f"{failed} runs failed.")


def start(bench: Bench, job: Job) -> bool:
    """Make one run with `one`; whether that worked."""
    command = [sys.executable, __file__, "--out", str(bench.out), "--tokens", str(job.budget)]
    command += ["--every", str(job.every), "--prompts", str(job.prompts)]
    command += ["one", "--arm", job.arm, "--lr", str(job.lr), "--seed", str(job.seed)]
    done = subprocess.run([*command, "--task", job.task], capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    click.echo(f"{job.name}: {lines[-1] if lines else done.returncode}")
    return done.returncode == 0


def tuning(bench: Bench, arms: Sequence[str]) -> list[Job]:
    """The runs that decide the arms' learning rates."""
    choices = product(TUNING_SEEDS, LEARNING_RATES, arms)
    return [bench.job(TASKS[0], arm, lr, seed) for seed, lr, arm in choices]


def rates(bench: Bench, known: dict[str, Run]) -> dict[str, float]:
    """Of each tuned arm the rate with the fewest tokens to the goal, over the tuning seeds.

    A rate that gets there with every seed goes before one that does not; of rates that never get
    there, the one with the higher pass@1 at its best is taken.
    """
    chosen = {}
    for arm in ARMS:
        runs = [known.get(identity(job.record)) for job in tuning(bench, [arm])]
        if all(runs):
            chosen[arm] = min(by_rate(runs).items(), key=lambda pair: badness(pair[1]))[0]
    return chosen


def by_rate(runs: Sequence[Run]) -> dict[float, list[Run]]:
    """The runs of each learning rate."""
    return {lr: [run for run in runs if run["lr"] == lr] for lr in LEARNING_RATES}


def badness(runs: Sequence[Run]) -> tuple[int, float, float]:
    """Runs that never got there, tokens to the goal, how low pass@1 stayed: to be compared."""
    spent = [cost(run) for run in runs]
    tokens = sum(each.value for each in spent)
    best = sum(float(curve(run)[1].max()) for run in runs)
    return sum(each.bound for each in spent), tokens, -best


# Statistics


@dataclass(frozen=True)
class Cost:
    """What a run spent until the goal; or, a lower bound, in all, when it never got there."""

    value: float
    bound: bool = False


def curve(run: Run, axis: str = "tokens") -> Curve:
    """What a run had spent and reached."""
    points = [(each[axis], each["pass@1"]) for each in run["evaluations"]]
    spent, accuracy = np.array(points, dtype=float).T
    return spent, accuracy


def reach(curve: Curve, goal: float = GOAL) -> float | None:
    """What was spent when pass@1 crossed the goal to stay above it, interpolated; None if never.

    A peak, or a policy that collapses later, has not got there.
    """
    spent, accuracy = curve
    below = np.flatnonzero(accuracy < goal)
    if not len(below):
        return float(spent[0])
    last = int(below[-1])
    if last + 1 == len(spent):
        return None
    share = (goal - accuracy[last]) / (accuracy[last + 1] - accuracy[last])
    return float(spent[last] + share * (spent[last + 1] - spent[last]))


def cost(run: Run, axis: str = "tokens") -> Cost:
    """What a run spent until the goal; a run that never got there counts as its whole budget."""
    at = reach(curve(run, axis))
    if at is not None:
        return Cost(at)
    return Cost(run["budget"] if axis == "tokens" else curve(run, axis)[0][-1], bound=True)


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95 % percentile interval over resampled values."""
    sample, rng = np.array(values), np.random.default_rng(0)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


def ratio(arm: dict[int, Cost], base: dict[int, Cost]) -> str:
    """Geometric mean over common seeds of the arm's cost against the base's, with its interval."""
    seeds = sorted(arm.keys() & base.keys())
    if not seeds:
        return "-"
    logs = [math.log(arm[seed].value / base[seed].value) for seed in seeds]
    mean, low, high = (math.exp(value) for value in bootstrap(logs))
    above, below = (any(costs[seed].bound for seed in seeds) for costs in (arm, base))
    mark = {(1, 0): "≥ ", (0, 1): "≤ ", (1, 1): "≷ "}.get((above, below), "")
    interval = f" ({low:.2f} to {high:.2f})" if len(seeds) > 1 else ""
    return f"{mark}{mean:.2f}{interval}"


def average(costs: dict[int, Cost], scale: float = 1.0) -> str:
    """The mean over the seeds, marked when it is a lower bound."""
    mean = np.mean([each.value for each in costs.values()]) / scale
    if math.isnan(mean):
        return "-"
    return ("≥ " if any(each.bound for each in costs.values()) else "") + f"{mean:,.0f}"


# The page

Seeds = dict[str, dict[int, Run]]
"""Runs by arm and seed."""


def collect(bench: Bench, task: str) -> Seeds:
    """The runs of a task with each arm's own learning rate."""
    known = bench.known()
    arms: Seeds = {}
    for arm, lr in rates(bench, known).items():
        seeds = {run["seed"] for run in known.values()} - set(TUNING_SEEDS)
        found = {s: known.get(identity(bench.job(task, arm, lr, s).record)) for s in sorted(seeds)}
        if any(found.values()):
            arms[arm] = {seed: run for seed, run in found.items() if run}
    return arms


def costs(runs: dict[int, Run], axis: str) -> dict[int, Cost]:
    """Cost of each seed."""
    return {seed: cost(run, axis) for seed, run in runs.items()}


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def results(arms: Seeds) -> str:
    """Tokens and seconds to the goal, against flat groups in large and in small steps."""
    rows = []
    for arm, runs in arms.items():
        tokens, seconds = costs(runs, "tokens"), costs(runs, "cpu_s")
        row = [arm, f"{next(iter(runs.values()))['lr']:g}", len(runs), average(tokens, 1000)]
        row += [against(arm, tokens, arms, base, "tokens") for base in BASES]
        row += [average(seconds), against(arm, seconds, arms, BASES[0], "cpu_s")]
        at = np.mean([np.interp(MARK, *curve(run)) for run in runs.values()])
        rows.append([*row, f"{at:.2f}"])
    heads = ["arm", "lr", "seeds", f"tokens to {GOAL:g}, thousands"]
    heads += [f"against {base}" for base in BASES]
    heads += ["seconds", f"against {BASES[0]}", f"pass@1 at {MARK // 1000}k tokens"]
    return table(heads, rows)


def against(arm: str, mine: dict[int, Cost], arms: Seeds, base: str, axis: str) -> str:
    """The ratio to a base arm; the arm itself is 1."""
    return "1" if arm == base else ratio(mine, costs(arms.get(base, {}), axis))


def details(arms: Seeds) -> str:
    """What else runs spent until the goal."""
    rows = [[arm, *(average(costs(runs, axis)) for axis in COSTS)] for arm, runs in arms.items()]
    heads = ["completions", "trained tokens", "prompt positions", "forward calls", "wall, s"]
    return table(["arm", *heads], rows)


def tuned(bench: Bench) -> str:
    """What each arm sets, and tokens to the goal at each learning rate."""
    known, rows = bench.known(), []
    for arm in rates(bench, known):
        runs = [known[identity(job.record)] for job in tuning(bench, [arm])]
        cells = [
            average({run["seed"]: cost(run) for run in mine}, 1000)
            for mine in by_rate(runs).values()
        ]
        rows.append([arm, *cells, words(ARMS[arm].settings)])
    return table(["arm", *(f"lr {lr:g}" for lr in LEARNING_RATES), "settings"], rows)


def words(settings: dict[str, Any]) -> str:
    """Settings as they are given to `--set`."""
    return ", ".join(f"`{key}={value}`" for key, value in settings.items())


def block(bench: Bench, machine: str) -> str:
    """The generated part of the page."""
    parts = [
        f"Measured on: {machine}. Made by `benchmarks/strategies.py`. pass@1 on {bench.prompts}\n"
        f"held-out prompts every {bench.every // 1000}k generated tokens; a crossing is the one\n"
        "after which pass@1 stays above to the run's end, interpolated. Seconds are processor\n"
        "seconds of training steps on one thread, without evaluations. Ratios are paired over\n"
        "seeds: geometric mean and 95 % bootstrap interval. ≥ marks a lower bound: a run that did\n"
        f"not reach {GOAL:g} counts as its whole budget. A run ends after two evaluations above\n"
        f"{STOP:g}; where it ended before {MARK // 1000}k tokens, its last pass@1 is taken there."
    ]
    for task in TASKS:
        if arms := collect(bench, task):
            parts += [f"### Task `{task}`", results(arms)]
            parts += [f"Spent until {GOAL:g} besides, means over the seeds:", details(arms)]
    parts += ["![pass@1 over generated tokens and over seconds](strategies.png)"]
    parts += [
        "### Arms and learning rates",
        f"Thousands of tokens to {GOAL:g} on the task `{TASKS[0]}` with two seeds of its own; the\n"
        "rate with the fewest serves the arm everywhere else, one that got there with both seeds\n"
        "before one that did not. All arms have "
        f"{words(BASE)}, or what they set instead.",
        tuned(bench),
    ]
    return "\n\n".join(parts)


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


def draw(arms: Seeds, path: Path) -> None:
    """pass@1 over tokens and over seconds: mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, (axis, scale) in zip(panels, (("tokens", 1000), ("cpu_s", 1)), strict=True):
        for arm in (name for name in COLORS if name in arms):
            curves = [curve(run, axis) for run in arms[arm].values()]
            grid = np.linspace(0, min(spent[-1] for spent, _ in curves), 200)
            lines = np.array([np.interp(grid, *each) for each in curves])
            axes.plot(grid / scale, lines.mean(axis=0), color=COLORS[arm], label=arm, lw=1.8)
            band = (lines.min(axis=0), lines.max(axis=0))
            axes.fill_between(grid / scale, *band, color=COLORS[arm], alpha=0.12, lw=0)
        axes.axhline(GOAL, color="black", lw=0.8, ls=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set(ylim=(0, 1), xlim=(0, None))
    panels[0].set(xlabel="generated tokens, thousands", ylabel=f"pass@1, held out ({TASKS[0]})")
    panels[1].set(xlabel="processor seconds of training")
    panels[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


# Commands


@click.group(help="The learning benchmark of the rollout strategies.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/strategies"))
@click.option(
    "--docs",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent.parent / "docs",
    help="Where strategies.md is.",
)
@click.option("--tokens", type=int, help="Lower every arm's budget to this.")
@click.option("--every", default=2_000, help="Generated tokens between evaluations.")
@click.option("--prompts", default=128, help="Held-out prompts in an evaluation.")
@click.pass_context
def main(context: click.Context, **sizes: Any) -> None:
    """Keep the sizes for the command."""
    context.obj = Bench(**sizes)


@main.command(help="One run, unless it is there.")
@click.option("--arm", type=click.Choice(list(ARMS)), required=True)
@click.option("--lr", type=float, required=True)
@click.option("--seed", type=int, required=True)
@click.option("--task", default=TASKS[0])
@click.pass_obj
def one(bench: Bench, arm: str, lr: float, seed: int, task: str) -> None:
    """Make a run and append its line."""
    job = bench.job(task, arm, lr, seed)
    if not missing([job], bench.known()):
        click.echo("there already")
        return
    run = make(job, bench.out)
    with closing(JsonLines(bench.file)) as lines:
        lines.append(run)
    last = run["evaluations"][-1]
    spent = f"{last['tokens']} tokens, {last['wall_s']:.0f} s"
    click.echo(f"pass@1 {last['pass@1']:.3f}, {spent}, {run['ended']}")


def portion(command: Any) -> Any:
    """The options of commands that make many runs."""
    command = click.option("--jobs", default=2, help="Runs at once.")(command)
    command = click.option("--tasks", default=TASKS[0], help="Comma-separated.")(command)
    command = click.option("--arms", default=",".join(ARMS), help="Comma-separated.")(command)
    return click.option("--seeds", default="0,1,2,3,4", help="Comma-separated.")(command)


@main.command("run", help="Make the runs that are missing.")
@portion
@click.option("--tune", is_flag=True, help="Make the runs that decide learning rates first.")
@click.pass_obj
def run_missing(bench: Bench, seeds: str, arms: str, tasks: str, jobs: int, tune: bool) -> None:
    """Tune, if wanted; then take the arms in turn, seed by seed."""
    names = [name.strip() for name in arms.split(",")]
    if unknown := set(names) - set(ARMS):
        raise click.ClickException(f"There is no arm {sorted(unknown)}; there are {list(ARMS)}.")
    if tune:
        schedule(bench, tuning(bench, names), jobs)
    chosen = rates(bench, bench.known())
    if untuned := [arm for arm in names if arm not in chosen]:
        raise click.ClickException(f"No learning rate is known for {untuned}: add --tune.")
    turns = product(tasks.split(","), map(int, seeds.split(",")), names)
    schedule(bench, [bench.job(task, arm, chosen[arm], seed) for task, seed, arm in turns], jobs)


@main.command("page", help="Write docs/strategies.md, between its markers, and the picture.")
@click.option("--machine", required=True, help="What it ran on, in words.")
@click.pass_obj
def write_page(bench: Bench, machine: str) -> None:
    """Write what the results say."""
    draw(collect(bench, TASKS[0]), bench.docs / "strategies.png")
    insert(block(bench, machine), bench.docs / "strategies.md")


@main.command("all", help="Tune, run, and write the page.")
@portion
@click.option("--machine", required=True, help="What it runs on, in words.")
@click.pass_context
def everything(context: click.Context, machine: str, **options: Any) -> None:
    """All of it."""
    context.invoke(run_missing, **options, tune=True)
    context.invoke(write_page, machine=machine)


if __name__ == "__main__":
    main()
