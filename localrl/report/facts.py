"""Statements about a run in plain words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.report.curves import column, mean
from localrl.report.reading import Run, Score
from localrl.runs.metrics import METRICS
from localrl.runs.schedule import evaluation_due, evaluations_after
from localrl.utils.text import sampled_at

RECENT = 10
"""Number of last steps that warnings examine."""
RARE, OFTEN = 0.1, 0.3
"""Shares below which a warning says "hardly any", and above which it says "many"."""
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def state(run: Run) -> str:
    """Describe the run's state and progress."""
    steps = f"step {run.step}" + (f" of {run.planned_steps}" if run.planned_steps else "")
    if run.state == "running":
        return f"running, {steps} done ({run.holder})"
    if run.state == "unknown":
        return f"{steps} done; only its own machine knows whether it is running ({run.holder})"
    return f"{run.state} after {steps}"


def model(run: Run) -> str:
    """Return the model as named in the settings."""
    path = run.settings.get("model.path")
    return str(path) if path else "the embedded model"


def first_and_last(run: Run) -> list[Score]:
    """Return the evaluations that show the effect of training: first and last, or fewer."""
    return [*run.scores[:1], *run.scores[1:][-1:]]


def score_words(score: Score) -> str:
    """Describe one evaluation with its interval."""
    loss = loss_words(score.loss, score.demonstrations)
    if loss and not score.n:
        return loss
    if score.interval is None:
        return f"pass@1 unknown on {score.n} held-out prompts"
    low, high = score.interval
    return (
        f"pass@1 {number(score.pass_at_1)} ({number(low)} to {number(high)}) "
        f"on {score.n} held-out prompts, {sampled_at(score.temperature)}"
        f"{f'; {loss}' if loss else ''}"
    )


def loss_words(loss: float | None, examples: int) -> str:
    """Describe the loss of held-out worked examples; empty if there is none."""
    return "" if loss is None else f"loss {loss:.3f} on {examples} held-out worked examples"


def moment(score: Score) -> str:
    """Say when an evaluation was made."""
    return f"after step {score.step}" if score.step else "before training"


def equal_groups(run: Run) -> str:
    """Say whether a group whose rewards are all equal can teach, and why; empty if unknown."""
    try:
        weight = RunConfig.create(run.settings).tracker_weight
    except ConfigError:  # settings of another version
        return ""
    if not weight:
        return (
            "A group whose rewards are all equal teaches nothing here: a completion is compared "
            "only with the others of its group (learning.kappa is 0)."
        )
    return (
        "A group whose rewards are all equal can still teach here: a completion is also compared "
        "with the reward expected of its prompt, from earlier steps (learning.kappa is "
        f"{weight:g}), so a group that does better or worse than expected as a whole counts."
    )


def seconds_left(run: Run) -> float | None:
    """Estimate the seconds that a run still needs; None if nothing tells.

    From the mean of the last steps, bounded by run.minutes, and the last evaluation's duration.
    """
    mean_s = mean(column(run.steps[-RECENT:], "step_time"))
    if not run.planned_steps or mean_s is None or run.state == "finished":
        return None
    left, minutes = mean_s * max(0, run.planned_steps - run.step), run.settings.get("run.minutes")
    if isinstance(minutes, int | float):
        left = min(left, max(0.0, 60 * minutes - seconds_spent(run)))
    return left + _evaluating_s(run)


def _evaluating_s(run: Run) -> float:
    """Estimate the seconds of the evaluations to come; 0 if the run records no durations."""
    last = run.scores[-1].seconds if run.scores else None
    every = run.settings.get("run.eval_every", 0)
    if last is None or not run.planned_steps or not isinstance(every, int):
        return 0.0
    due = run.step > run.scores[-1].step and evaluation_due(run.step, run.planned_steps, every)
    return last * (due + evaluations_after(run.step, run.planned_steps, every))


def seconds_spent(run: Run) -> float:
    """Return the seconds spent in steps, without evaluations."""
    return sum(value or 0.0 for value in column(run.steps, "step_time"))


def duration(seconds: float) -> str:
    """Format a time for readers, in two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def glance(run: Run) -> list[tuple[str, str, str]]:
    """Return the numbers that say how a run stands: name, value, and a note on it."""
    if not run.steps:
        return []
    first, last = run.steps[:RECENT], run.steps[-RECENT:]
    found = [("step", number(run.step), f"of {number(run.planned_steps)}")]
    left = seconds_left(run)
    if run.state == "running" and left is not None:
        found.append(("time left", f"about {duration(left)}", "at the speed of the last steps"))
    without = "" if not run.scores else ", evaluations not counted"
    found.append(("time", duration(seconds_spent(run)), f"in steps{without}"))
    name = "loss" if run.supervised else "reward"
    values = [mean(column(part, name)) for part in (last, first)]
    if len(run.steps) >= 2 * RECENT:
        found.append((name, number(values[0]), f"first {RECENT} steps: {number(values[1])}"))
    else:
        found.append((name, number(values[0]), "mean of the last steps"))
    taken = sum(value or 0.0 for value in column(last, "step_time"))
    if taken:
        found.append(("speed", f"{_sum(last, 'rollout/tokens') / taken:,.0f}", "tokens a second"))
    return [*found, *_memory(run)]


def _memory(run: Run) -> list[tuple[str, str, str]]:
    names = ("memory/resident_bytes", "memory/peak_bytes")
    peaks = [
        max((v for v in column(run.steps, name) if v is not None), default=0) for name in names
    ]
    if not any(peaks):
        return []
    limit = run.plan.get("limit_bytes")
    note = f"limit {size(limit)}" if limit else "no limit"
    return [("memory", size(max(peaks)), f"at most, {note}")]


@dataclass(frozen=True)
class Answer:
    """A held-out prompt with the answers before training and at the last evaluation."""

    prompt: str
    answer: str
    before: str
    before_reward: float | None
    after: str | None
    """None as long as there was one evaluation."""
    after_reward: float | None


def answers(run: Run) -> list[Answer]:
    """Return answers to the same prompts before and after; empty if the run stores none."""
    if not run.scores:
        return []
    before, after = run.scores[0], run.scores[-1]
    known = after.prompts == before.prompts and len(run.scores) > 1
    later = {str(one.get("prompt")): one for one in after.shown} if known else {}
    return [_answer(one, later.get(str(one.get("prompt")))) for one in before.shown]


def rated(reward: float | None) -> str:
    """Return the class in which a page shows a reward: full, some, or quiet for none."""
    return "quiet" if not reward or reward < 0 else "full" if reward >= 1 else "some"


def _answer(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Answer:
    return Answer(
        prompt=str(before.get("prompt")),
        answer=str(before.get("answer")),
        before=str(before.get("completion")),
        before_reward=_reward(before),
        after=None if after is None else str(after.get("completion")),
        after_reward=None if after is None else _reward(after),
    )


def _reward(shown: Mapping[str, Any]) -> float | None:
    reward = shown.get("reward")
    return reward if isinstance(reward, int | float) else None


def warnings(run: Run) -> list[str]:
    """Return the warnings that readers should know before they trust the rest."""
    found = [
        f"{n} lines of {name} cannot be read and are skipped." for name, n in run.unread.items()
    ]
    found += _from_events(run.events)
    return found + (_from_steps(run, run.steps[-RECENT:]) if run.steps else [])


def meaning(key: str) -> tuple[str, str]:
    """Return the unit and meaning of a metric; empty for one logged by reward functions."""
    if key in METRICS:
        return METRICS[key]
    if key.startswith("rewards/"):
        return METRICS.get(f"rewards/<name>/{key.rsplit('/')[-1]}", ("", ""))
    return "", ""


def why(reason: str) -> str:
    """Explain the reason for not learning from a group or completion; empty if unknown."""
    key = "selection/" + reason.replace(" ", "_").replace("-", "_")
    return meaning(key)[1].removeprefix("left out: ")


def number(value: Any) -> str:
    """Format a number for readers; a number that could not be measured is "unknown"."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def with_unit(key: str, value: Any) -> str:
    """Format a metric with its unit; bytes in the largest fitting one."""
    unit = meaning(key)[0]
    if unit == "bytes" and isinstance(value, int | float):
        return size(value)
    known = number(value)
    return known if value is None or unit == "reward" else f"{known} {unit}".strip()


def size(n: float) -> str:
    """Format bytes for readers."""
    name = next((u for u in reversed(UNITS) if n >= UNITS[u]), "B")
    return f"{n / UNITS[name]:.3g} {name}"


TROUBLE = {
    "restarted": "The run died and was restarted from its last checkpoint",
    "update_skipped": "An update was skipped",
    "failed": "The run ended with an error",
}
"""Descriptions of events that carry a reason."""


def _from_events(events: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    failed = [event for event in events if event.get("kind") == "checkpoint_failed"]
    if failed:
        reason = failed[-1].get("reason")
        found.append(f"{len(failed)} checkpoints could not be written; the last reason: {reason}")
    for event in events:
        if event.get("kind") == "rollouts_thinned":
            found.append(
                f"From step {event.get('step')} on, rollouts.jsonl has only every "
                f"{event.get('every')}th group: it reached its limit (run.rollout_log_limit)."
            )
        if str(event.get("sandbox", "")).startswith("UNSAFE"):
            found.append("Code in answers ran without a sandbox.")
        if event.get("kind") == "warning":
            found.append(f"Step {event.get('step')}: {event.get('text')}")
        if event.get("kind") in TROUBLE:
            found.append(f"{TROUBLE[event['kind']]}: {event.get('reason')}")
    return list(dict.fromkeys(found))


def _from_steps(run: Run, recent: Sequence[Mapping[str, Any]]) -> list[str]:
    found, last = [], f"In the last {len(recent)} steps" if len(recent) > 1 else "In the last step"
    if failures := recent[-1].get("rewards/failures"):
        found.append(f"{failures} reward calls failed; completions without a reward teach nothing.")
    teaching, groups = _sum(recent, "rollout/informative_groups"), _sum(recent, "rollout/groups")
    if groups and teaching / groups < RARE:
        found.append(f"{last} {teaching:g} of {groups:g} groups had something to teach.")
    clipped = mean(column(recent, "completions/clipped_ratio"))
    if clipped is not None and clipped > OFTEN:
        most = run.settings.get("rollout.max_completion_tokens")
        found.append(
            f"{last} {clipped:.0%} of the completions were cut off at {most} tokens "
            "(rollout.max_completion_tokens)."
        )
    still = [step for step in recent if step.get("update/applied") is False]
    if still:
        found.append(f"{last} {len(still)} made no update.")
    limit, peaks = run.plan.get("limit_bytes"), column(run.steps, "memory/peak_bytes")
    peak = max((value for value in peaks if value is not None), default=0.0)
    if limit and peak > limit:
        found.append(f"MLX held {size(peak)}, more than the limit of {size(limit)}.")
    return found


def _sum(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(value or 0.0 for value in column(steps, name))
