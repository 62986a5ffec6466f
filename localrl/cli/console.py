"""Progress display of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from localrl.embedded import EMBEDDED_MODEL
from localrl.report.reading import read_run
from localrl.report.verdict import verdict
from localrl.utils.text import printable, sampled_at

if TYPE_CHECKING:
    from localrl.evaluate import Evaluation, Shown
    from localrl.rollouts.groups import Shape
    from localrl.train import RunResult
    from localrl.training.session import Session

PLAIN_EVERY_S = 10.0
"""Seconds between plain lines when there is no terminal."""
SHOWN = 3
"""Number of held-out prompts whose completions are printed at the end."""


class Console:
    """Shows a run on stderr and its result on stdout; satisfies `session.Progress`."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._first, self._steps = 0, 0
        self._limit_s: float | None = None
        self._started = 0.0
        self._last_line = 0.0

    def begin(self, session: Session) -> None:
        """Print the model, the task, the machine and the plan."""
        config, plan = session.config, session.plan
        own = config.model.path is None
        self._first, self._steps = session.step, config.run.steps
        self._limit_s = 60 * config.run.minutes if config.run.minutes is not None else None
        self._line(f"run      {session.folder}")
        name = EMBEDDED_MODEL if own else config.model.path
        demonstration = " (embedded, with the demonstration settings)" if own else ""
        self._line(f"model    {name}{demonstration}")
        self._line(f"task     {session.task.name}: {session.task.description}")
        prompts = config.rollout.prompts_per_step
        self._line(
            f"step     {prompts} prompts x {completions(session.sampler.shape)} of at most "
            f"{plan.max_completion_tokens} tokens, lr {config.learning.lr:g}, "
            f"LoRA rank {config.lora.rank}"
        )
        threads = f", BLAS threads: {plan.threads}" if plan.threads else ""
        self._line(f"machine  {plan.reason}{threads}")
        if session.step:
            self._line(f"resumed  after step {session.step}")
        elif session.held_out:
            self._line(f"evaluating on {len(session.held_out)} held-out prompts ...")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Print one line per evaluation."""
        when = "before training" if step == 0 else f"after step {step}"
        self._line(f"{when}: {_score(evaluation)}")
        if step == 0:
            self._start_bar()

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """Advance the bar, or print a plain line at intervals."""
        if self._bar is None:
            self._start_bar()
        assert self._bar is not None
        self._bar.set_postfix_str(_postfix(metrics), refresh=False)
        self._bar.update()
        step, now = metrics["step"], time.monotonic()
        if self._bar.disable and (now - self._last_line > PLAIN_EVERY_S or step == self._steps):
            self._last_line = now
            left = self._time_left(step, now)
            self._line(f"step {step}/{self._steps}  {_postfix(metrics)}, {left} left")

    def warn(self, line: str) -> None:
        """Print a warning without breaking the bar."""
        self._line(f"warning: {line}")

    def finish(self, result: RunResult) -> None:
        """Print the result: before and after, three completions of each, next commands."""
        if self._bar is not None:
            self._bar.close()
        if result.base and result.adapter:
            click.echo("\n" + comparison(result.base, result.adapter))
        click.echo(verdict(read_run(result.folder)))
        click.echo(
            f"{result.steps} steps in {result.train_s:.0f} s; everything is in {result.folder}"
        )
        click.echo(memory(result))
        click.echo("\n" + next_command(result))

    def _start_bar(self) -> None:
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=self._steps,
            initial=self._first,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def _time_left(self, step: int, now: float) -> str:
        left = (now - self._started) / (step - self._first) * (self._steps - step)
        if self._limit_s is not None:
            left = min(left, max(0.0, self._limit_s - (now - self._started)))
        return tqdm.format_interval(left)

    def _line(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


def completions(shape: Shape) -> str:
    """Describe the number of completions per prompt in words."""
    most = shape.leaves * shape.rounds
    if shape.rounds > 1:
        return f"{shape.roots} to {most} completions"
    if shape.leaves > shape.roots:
        return f"trees with up to {most} completions"
    return f"{most} completion{'s' if most > 1 else ''}"


def comparison(base: Evaluation, adapter: Evaluation) -> str:
    """Format the before/after table and three held-out prompts with both completions."""
    lines = [f"{'':10}{'pass@1':>8}{'95 % interval':>18}{'mean reward':>14}{'tokens':>9}"]
    for name, side in (("base", base), ("adapter", adapter)):
        low, high = side.ci95 or (None, None)
        interval = f"{_number(low)} to {_number(high)}"
        lines.append(
            f"{name:10}{_number(side.pass_at_1):>8}{interval:>18}"
            f"{_number(side.mean_reward):>14}{_number(side.mean_completion_tokens, 1):>9}"
        )
    for before, after in zip(base.shown[:SHOWN], adapter.shown, strict=False):
        lines += ["", f"prompt    {printable(before.prompt)}   (answer: {before.answer})"]
        lines += [f"  before  {_completion(before)}", f"  after   {_completion(after)}"]
    return "\n".join(lines) + "\n"


def memory(result: RunResult) -> str:
    """Format predicted and measured peak memory beside the limit."""
    predicted, limit = result.plan.predicted_bytes, result.plan.limit_bytes
    return (
        f"memory of MLX: predicted at most {_bytes(predicted)}, "
        f"measured {_bytes(result.peak_bytes)}, limit {_bytes(limit)}"
    )


def next_command(result: RunResult) -> str:
    """Suggest the next commands to run."""
    folder = shlex.quote(str(result.folder))
    return (
        f"adapter: {result.folder / 'adapter'} (mlx-lm format)\n"
        f"next: localrl chat {folder}             ask the trained model\n"
        f"      localrl show {folder} --report    curves, groups and answers as a page\n"
        f"      localrl export {folder} --fused   a complete model\n"
        f"      localrl push {folder} USER/NAME   the adapter on the Hub"
    )


def _completion(shown: Shown) -> str:
    verdict = "no reward" if shown.reward is None else f"reward {shown.reward:g}"
    return f"{printable(shown.completion)}   [{verdict}]"


def _score(evaluation: Evaluation) -> str:
    low, high = evaluation.ci95 or (None, None)
    return (
        f"pass@1 {_number(evaluation.pass_at_1)} ({_number(low)} to {_number(high)}) "
        f"on {evaluation.n} held-out prompts, {sampled_at(evaluation.temperature)}"
    )


def _postfix(metrics: Mapping[str, Any]) -> str:
    rate = metrics["rollout/tokens"] / metrics["step_time"]
    memory = metrics["memory/resident_bytes"] or metrics["memory/peak_bytes"]
    return (
        f"reward {_number(metrics['reward'])}, "
        f"informative {metrics['rollout/informative_groups']}/{metrics['rollout/groups']}, "
        f"{rate:.0f} tok/s, {memory / 2**30:.2f} GiB"
    )


def _bytes(size: int | None) -> str:
    from localrl.memory.limit import show

    return "unknown" if size is None else show(size)


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"
