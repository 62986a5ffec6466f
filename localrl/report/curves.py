"""The curves of a run, as numbers, for both the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from localrl.report.reading import Run

Values = tuple[float | None, ...]
Step = Mapping[str, Any]

MIB = 2**20
MOST_PARTS = 4
"""Number of reward functions that get a line of their own."""
FLAT, FAR_BELOW = 0.05, 0.1
"""Share of its highest value within which a line is flat; share of a limit far below which it is
not in sight."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: a value for each step, None if there is none."""

    label: str
    values: Values
    faint: bool = False
    """True if it is only a background to the other lines."""


@dataclass(frozen=True)
class Chart:
    """Lines over the same steps."""

    title: str
    unit: str
    about: str
    steps: tuple[int, ...]
    lines: tuple[Line, ...]
    limit: float | None = None
    """A horizontal line that the others should stay below."""
    share: bool = False
    """True if the values are shares of 1."""
    cost: bool = False
    """True if it shows what the run costs, and not what the model learns."""
    spans: tuple[tuple[float, float] | None, ...] = ()
    """An interval around each value of the only line."""

    @property
    def known(self) -> bool:
        """True if it contains any value."""
        return any(value is not None for line in self.lines for value in line.values)


def _known(chart: Chart) -> tuple[Line, ...]:
    return tuple(line for line in chart.lines if any(v is not None for v in line.values))


def charts(run: Run) -> list[Chart]:
    """Return all charts of a run, most important first; those that say nothing are left out."""
    steps = tuple(step["step"] for step in run.steps)
    shown = SUPERVISED_CHARTS if run.supervised else CHARTS
    made = [make(run.steps) for make in shown]
    made += [memory] if not _says_little(memory := _memory(run)) else []
    found = [replace(chart, steps=steps, lines=_known(chart)) for chart in made if chart.known]
    held_out = [_held_out_loss(run), _passed(run)] if len(run.scores) > 1 else []
    found[1:1] = [chart for chart in held_out if chart.known]
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def smoothed(values: Values) -> Values:
    """Return the mean of each value and its neighbours, over a tenth of all values."""
    reach, count = len(values) // 20, len(values)
    sums = [0.0, *accumulate(value or 0.0 for value in values)]
    known = [0, *accumulate(int(value is not None) for value in values)]
    around = ((max(0, i - reach), min(count, i + reach + 1)) for i in range(count))
    return tuple(
        (sums[end] - sums[start]) / (known[end] - known[start])
        if known[end] > known[start]
        else None
        for start, end in around
    )


def column(steps: Sequence[Step], name: str, scale: float = 1.0) -> Values:
    """Return a metric over the steps; None if it is missing or not a number."""
    return tuple(_number(step.get(name), scale) for step in steps)


def part_names(steps: Sequence[Step]) -> list[str]:
    """Return the names of the reward functions in the steps."""
    head, tail = "rewards/", "/mean"
    keys = dict.fromkeys(key for step in steps for key in step)
    return [k[len(head) : -len(tail)] for k in keys if k.startswith(head) and k.endswith(tail)]


def sparkline(values: Sequence[float | None], width: int, low: float, high: float) -> str:
    """Draw the values as a row of at most `width` blocks, with a blank if there is no value."""
    blocks, cells = "▁▂▃▄▅▆▇█", min(width, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)] if cells else []
    points = [mean(values[start:end]) for start, end in pairwise(edges)]
    span = (high - low) or 1.0
    levels = [None if p is None else int((p - low) / span * len(blocks)) for p in points]
    return "".join(
        " " if level is None else blocks[min(max(level, 0), len(blocks) - 1)] for level in levels
    )


def tokens_so_far(steps: Sequence[Step]) -> list[float]:
    """Return the completion tokens sampled up to each step."""
    return list(accumulate(value or 0.0 for value in column(steps, "rollout/tokens")))


def _number(value: Any, scale: float = 1.0) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value / scale if known else None


def _ratio(steps: Sequence[Step], over: str, under: str) -> Values:
    pairs = zip(column(steps, over), column(steps, under), strict=True)
    return tuple(a / b if a is not None and b else None for a, b in pairs)


def _less(values: Values, others: Values) -> Values:
    pairs = zip(values, others, strict=True)
    return tuple(None if a is None else max(0.0, a - (b or 0.0)) for a, b in pairs)


def _reward(steps: Sequence[Step]) -> Chart:
    rewards, names = column(steps, "reward"), part_names(steps)
    about = "Mean over the completions that have one."
    lines = [Line("each step", rewards, faint=True), Line("smoothed", smoothed(rewards))]
    if len(names) > 1:
        shown = names[:MOST_PARTS]
        lines += [Line(name, smoothed(column(steps, f"rewards/{name}/mean"))) for name in shown]
        left_out = f", the first {MOST_PARTS} of {len(names)}" if shown != names else ""
        about += f" Reward functions before their weights{left_out}."
    return Chart("Reward", "", about, (), tuple(lines))


def _loss(steps: Sequence[Step]) -> Chart:
    losses = column(steps, "loss")
    about = "Mean over the tokens of the step's worked examples, before its update."
    lines = (Line("each step", losses, faint=True), Line("smoothed", smoothed(losses)))
    return Chart("Loss", "nats", about, (), lines)


def _learned(steps: Sequence[Step]) -> Chart:
    share = _ratio(steps, "rollout/informative_groups", "rollout/groups")
    equal = column(steps, "frac_reward_zero_std")
    return Chart(
        "Groups that teach",
        "share",
        "Groups with something to learn from, and groups whose rewards are all equal.",
        (),
        (Line("teach", share), Line("all equal", equal)),
        share=True,
    )


def _entropy(steps: Sequence[Step]) -> Chart:
    about = "Uncertainty of the model, mean over sampled tokens."
    return Chart("Entropy", "nats", about, (), (Line("entropy", column(steps, "entropy")),))


def _length(steps: Sequence[Step]) -> Chart:
    names = {"mean": "mean", "shortest": "min", "longest": "max"}
    lines = [
        Line(label, column(steps, f"completions/{key}_length"), faint=key != "mean")
        for label, key in names.items()
    ]
    return Chart("Completion length", "tokens", "Including the end token.", (), (*lines,))


def _kl(steps: Sequence[Step]) -> Chart:
    about = "Distance of the policy from the adapter it began with, or else the base model."
    return Chart("KL", "nats", about, (), (Line("KL", column(steps, "kl")),))


def _drift(steps: Sequence[Step]) -> Chart:
    about = "Mean change of log-probability on a step's trained tokens."
    return Chart("Drift", "nats", about, (), (Line("drift", column(steps, "update/drift")),))


def _tokens(steps: Sequence[Step]) -> Chart:
    lines = (
        Line("sampled", column(steps, "rollout/tokens")),
        Line("trained", column(steps, "update/trained_tokens")),
        Line("shared by forks", column(steps, "tree/saved_tokens")),
    )
    if not any(lines[2].values):
        lines = lines[:2]
    about = "Sampled, and learned from."
    return Chart("Tokens of a step", "tokens", about, (), lines, cost=True)


def _time(steps: Sequence[Step]) -> Chart:
    rollout, reward = column(steps, "time/rollout_s"), column(steps, "time/reward_s")
    update, whole = column(steps, "time/update_s"), column(steps, "step_time")
    lines = (
        Line("sampling", _less(rollout, reward)),
        Line("rewards", reward),
        Line("update", update),
        Line("whole step", whole, faint=True),
    )
    return Chart("Time of a step", "s", "By phase.", (), lines, cost=True)


def _gradient(steps: Sequence[Step]) -> Chart:
    about = "Global norm before clipping; none if nothing was learned."
    lines = (Line("norm", column(steps, "grad_norm")),)
    return Chart("Gradient", "", about, (), lines, cost=True)


def _passed(run: Run) -> Chart:
    return Chart(
        "Held-out prompts solved",
        "pass@1",
        "One completion for each prompt, with 95 % intervals.",
        tuple(score.step for score in run.scores),
        (Line("pass@1", tuple(score.pass_at_1 for score in run.scores)),),
        share=True,
        spans=tuple(score.interval for score in run.scores),
    )


def _held_out_loss(run: Run) -> Chart:
    return Chart(
        "Held-out loss",
        "nats",
        "Mean over the tokens of the held-out worked examples.",
        tuple(score.step for score in run.scores),
        (Line("loss", tuple(score.loss for score in run.scores)),),
    )


def _memory(run: Run) -> Chart:
    limit = _number(run.plan.get("limit_bytes"), MIB)
    lines = (
        Line("MLX's peak", column(run.steps, "memory/peak_bytes", MIB)),
        Line("process", column(run.steps, "memory/resident_bytes", MIB)),
    )
    about = "Compared with the plan's limit." if limit else "The plan set no limit."
    return Chart("Memory", "MiB", about, (), lines, limit, cost=True)


def _says_little(chart: Chart) -> bool:
    """Return True if all lines are flat, or far below the limit: a number says as much."""
    known = [[v for v in line.values if v is not None] for line in chart.lines]
    flat = all(max(line) - min(line) <= FLAT * max(line) for line in known if line)
    highest = max((max(line) for line in known if line), default=0.0)
    return flat or (chart.limit is not None and highest < FAR_BELOW * chart.limit)


CHARTS: tuple[Callable[[Sequence[Step]], Chart], ...] = (
    _reward,
    _learned,
    _entropy,
    _length,
    _kl,
    _drift,
    _tokens,
    _time,
    _gradient,
)
SUPERVISED_CHARTS: tuple[Callable[[Sequence[Step]], Chart], ...] = (
    _loss,
    _length,
    _kl,
    _drift,
    _time,
    _gradient,
)
