"""What the runs of tokens_to_learn.py say: costs until a goal, paired ratios, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from learning_arms import ARMS, BASES, SUBJECTS, Goal, Subject
from learning_runs import Job, Run, identity

from localrl.runs.logs import read_jsonl

PLACE = Path(__file__).resolve().with_name("tokens_to_learn")
RESAMPLES = 10_000
SEEDS = 5
"""Fewest pairs of runs by which an arm is called better."""
MOST_LOAD = 1.5
"""Load above which seconds of a run are not compared; every run beside it adds 1."""
MOST_WAITED = 0.05
"""Share of a run for which its threads may wait for a core; where that is known, it decides in the
place of the load."""
HOUR_S = 3600.0
"""Most seconds between the starts of two runs whose seconds are compared."""

Curve = tuple[np.ndarray, np.ndarray]
"""What was spent, of one kind, and the goal's measure, at each evaluation."""
Known = dict[str, list[Run]]
"""The runs there are, by `identity`: the arm that others are paired with may be made again."""


@dataclass(frozen=True)
class Cost:
    """What a run spent until the goal; or, a lower bound, in all, when it never got there."""

    value: float
    bound: bool = False


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    pairs: int
    mark: str = ""
    """"≥", "≤" or "≷" if some of the costs are bounds."""

    def __str__(self) -> str:
        interval = f" ({self.low:.2f} to {self.high:.2f})" if self.pairs > 1 else ""
        return f"{self.mark}{self.mean:.2f}{interval}"


def results(subject: Subject, place: Path = PLACE) -> Path:
    """Return the file of a subject's results, one line per run."""
    return place / f"{subject.name}.jsonl"


def read(path: Path) -> Known:
    """Return the runs in a file."""
    known: Known = {}
    for run in read_jsonl(path) if path.exists() else ():
        known.setdefault(identity(run), []).append(run)
    return known


def missing(jobs: Sequence[Job], known: Known) -> list[Job]:
    """Return the jobs that have not been done, in order."""
    return [job for job in jobs if identity(job.record) not in known]


# One run


def curve(run: Run, axis: str = "tokens") -> Curve:
    """Return what a run had spent and reached at each evaluation."""
    measure = SUBJECTS[run["subject"]].tasks[run["task"]].measure
    points = [(each[axis], each[measure]) for each in run["evaluations"]]
    spent, accuracy = np.array(points, dtype=float).T
    return spent, accuracy


def rising(values: np.ndarray) -> np.ndarray:
    """Return the nondecreasing sequence with the least squared distance from `values`, (n,).

    Pool adjacent violators (Ayer et al. 1955): neighbours out of order become their mean. It needs
    no width, and a policy that collapses has not got where it was before.
    """
    means: list[float] = []
    sizes: list[int] = []
    for value in values:
        mean, size = float(value), 1
        while means and means[-1] > mean:
            before, count = means.pop(), sizes.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)


def reach(curve: Curve, goal: float) -> float | None:
    """Return what was spent when the rising fit crossed the goal, interpolated; None if never."""
    spent, accuracy = curve[0], rising(curve[1])
    there = np.flatnonzero(accuracy >= goal)
    if not len(there):
        return None
    first = int(there[0])
    if first == 0:
        return float(spent[0])
    share = (goal - accuracy[first - 1]) / (accuracy[first] - accuracy[first - 1])
    return float(spent[first - 1] + share * (spent[first] - spent[first - 1]))


def cost(run: Run, goal: float, axis: str = "tokens") -> Cost:
    """Return what a run spent until the goal.

    A run that never got there counts as its whole budget, even if it ended early by diverging, but
    for one whose time was up.
    """
    at = reach(curve(run, axis), goal)
    if at is not None:
        return Cost(at)
    last = float(curve(run, axis)[0][-1])
    whole = axis == "tokens" and run["ended"] != "time"
    return Cost(max(last, run["budget"]) if whole else last, bound=True)


# Pairs


def timed(run: Run, subject: Subject) -> bool:
    """Return True if the run had the cores it wanted, so that its seconds count.

    A processor's seconds in one thread leave out what it waited for, and always count.
    """
    where = run["where"]
    if subject.seconds == "cpu_s":
        return True
    if where.get("waited") is not None:
        return where["waited"] <= MOST_WAITED
    return where["load"] <= MOST_LOAD + subject.at_once - 1


def paired(run: Run, base: Run) -> bool:
    """Return True if both ran on one machine within an hour."""
    mine, other = run["where"], base["where"]
    near = abs(mine["started"] - other["started"]) <= HOUR_S
    return near and mine["machine"] == other["machine"]


def pairs_of(
    arm: dict[int, list[Run]], base: dict[int, list[Run]], counts: Callable[[Run], bool] | None
) -> list[tuple[Run, Run]]:
    """Return for each common seed a run of the arm and one of the base.

    counts: says which runs' seconds count; only those on one machine within an hour are then
    paired. None: tokens are compared, and any two will do.
    """
    found = []
    for seed in sorted(arm.keys() & base.keys()):
        both = [(mine, other) for mine in arm[seed] for other in base[seed]]
        if counts is not None:
            both = [
                (mine, other)
                for mine, other in both
                if counts(mine) and counts(other) and paired(mine, other)
            ]
        found += both[:1]
    return found


def ratio(costs: Sequence[tuple[Cost, Cost]]) -> Ratio | None:
    """Return the mean of the first costs against the second ones; None without any.

    Pairs in which one is at the goal from the start are left out.
    """
    costs = [pair for pair in costs if pair[0].value > 0 and pair[1].value > 0]
    if not costs:
        return None
    logs = [math.log(mine.value / other.value) for mine, other in costs]
    mean, low, high = (math.exp(value) for value in bootstrap(logs))
    above, below = (any(pair[side].bound for pair in costs) for side in (0, 1))
    mark = {(True, False): "≥ ", (False, True): "≤ ", (True, True): "≷ "}.get((above, below), "")
    return Ratio(mean, low, high, len(costs), mark)


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and its 95 % percentile interval over resampled values."""
    sample, rng = np.array(values), np.random.default_rng(0)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)


# Learning rates


def tuning(subject: Subject, arm: str) -> list[Job]:
    """Return the runs that decide an arm's learning rate; none if there is one rate only."""
    if len(subject.rates) == 1 or ARMS[arm].rate_of:
        return []
    task = next(iter(subject.tasks))
    return [
        Job.of(subject, task, arm, lr, seed)
        for seed in subject.tuning_seeds
        for lr in subject.rates
    ]


def rate(subject: Subject, arm: str, known: Known) -> float | None:
    """Return the tuned rate with the fewest tokens to the goal; None while a run is missing.

    A rate that gets there with every seed goes before one that does not; of rates that never get
    there, the one that was higher at its best is taken.
    """
    if len(subject.rates) == 1:
        return subject.rates[0]
    if other := ARMS[arm].rate_of:
        return rate(subject, other, known)
    jobs = tuning(subject, arm)
    if missing(jobs, known):
        return None
    runs = {
        lr: [known[identity(job.record)][0] for job in jobs if job.lr == lr] for lr in subject.rates
    }
    goal = jobs[0].goal.goal
    return min(runs, key=lambda lr: badness(runs[lr], goal))


def badness(runs: Sequence[Run], goal: float) -> tuple[int, float, float]:
    """Return runs that never got there, tokens to the goal, and how low it stayed."""
    spent = [cost(run, goal) for run in runs]
    best = sum(float(curve(run)[1].max()) for run in runs)
    return sum(each.bound for each in spent), sum(each.value for each in spent), -best


# A task

Seeds = dict[str, dict[int, list[Run]]]
"""Runs by arm and seed."""


@dataclass(frozen=True)
class Part:
    """The runs of one task with each arm's own learning rate."""

    subject: Subject
    task: str
    arms: Seeds

    @property
    def goal(self) -> Goal:
        """The task's goal."""
        return self.subject.tasks[self.task]

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for seeds in self.arms.values() for each in seeds.values() for run in each]

    def against(self, arm: str, base: str, axis: str) -> Ratio | None:
        """Return an arm's cost against a base arm's, paired over seeds."""
        return ratio(self.pairs(arm, base, axis))

    def pairs(self, arm: str, base: str, axis: str) -> list[tuple[Cost, Cost]]:
        """Return the costs of an arm and of a base arm for each seed that both have."""
        counts = self.timed if axis == self.subject.seconds else None
        runs = pairs_of(self.arms.get(arm, {}), self.arms.get(base, {}), counts)
        return [(self._cost(mine, axis), self._cost(other, axis)) for mine, other in runs]

    def costs(self, arm: str, axis: str) -> list[Cost]:
        """Return the cost of each seed's first run, for seconds its first quiet one."""
        runs = [
            [run for run in each if axis != self.subject.seconds or self.timed(run)]
            for each in self.arms[arm].values()
        ]
        return [self._cost(each[0], axis) for each in runs if each]

    def better(self, arm: str) -> list[str]:
        """Return in what an arm is better than flat in small steps, outside its interval."""
        found = [
            (word, self.against(arm, BASES[1], axis))
            for word, axis in (("tokens", "tokens"), ("seconds", self.subject.seconds))
        ]
        sure = [word for word, r in found if r and r.pairs >= SEEDS and r.high < 1]
        return [f"{word} on `{self.task}`" for word in sure]

    def _cost(self, run: Run, axis: str) -> Cost:
        return cost(run, self.goal.goal, axis)

    def timed(self, run: Run) -> bool:
        """Return True if the seconds of a run count."""
        return timed(run, self.subject)


def collect(subject: Subject, known: Known) -> Iterator[Part]:
    """Yield the runs of each task that has some."""
    tuned = {arm: rate(subject, arm, known) for arm in ARMS}
    seeds = {run["seed"] for runs in known.values() for run in runs} - set(subject.tuning_seeds)
    for task in subject.tasks:
        arms: Seeds = {}
        for arm, lr in tuned.items():
            if lr is None:
                continue
            jobs = {seed: Job.of(subject, task, arm, lr, seed) for seed in sorted(seeds)}
            runs = {seed: known.get(identity(job.record), []) for seed, job in jobs.items()}
            if any(runs.values()):
                arms[arm] = {seed: some for seed, some in runs.items() if some}
        if arms:
            yield Part(subject, task, arms)
