"""Progress display of a run: a line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from localrl.display.line import PATIENCE_S, Picture, StatusLine, WorkClock, elapsed, picture_of
from localrl.embedded import EMBEDDED_MODEL
from localrl.processes.heartbeat import Heartbeat
from localrl.records import MemoryPlan, Work
from localrl.report import facts
from localrl.report.reading import read_run
from localrl.report.verdict import verdict
from localrl.utils.figures import fixed
from localrl.utils.text import printable, sampled_at

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.evaluate import Evaluation, Shown
    from localrl.rollouts.groups import Shape
    from localrl.training.result import RunResult
    from localrl.training.session import Session

STEP_EVERY_S = 10.0
"""Seconds between plain lines of steps where there is no terminal."""
SHOWN = 3
"""Number of held-out prompts whose completions are printed at the end."""
LONG_S = 3600.0
"""Expected duration of a run from which on the head says how to make it shorter."""


class Console:
    """Shows a run on stderr and its result on stdout; satisfies `session.Progress`."""

    def __init__(self) -> None:
        self._line: StatusLine | None = None
        self._clock: WorkClock | None = None
        self._session: Session | None = None
        self._metrics: Mapping[str, Any] | None = None
        self._evaluating: str | None = None
        self._since = self._last_line = time.monotonic()

    @property
    def began(self) -> bool:
        """True if the run has been opened."""
        return self._session is not None

    def start(self, heartbeat: Heartbeat) -> None:
        """Begin to show what the heartbeat names."""
        self._clock = WorkClock(heartbeat)
        self._line = StatusLine(self._picture, patience_s=PATIENCE_S)

    def begin(self, session: Session) -> None:
        """Print the model, the task, the machine and the plan."""
        from localrl.policy.lora import experts_note

        config, plan = session.config, session.plan
        own = config.model.path is None
        self._session = session
        self._write(f"run      {session.folder}")
        name = EMBEDDED_MODEL if own else config.model.path
        demonstration = " (embedded, with the demonstration settings)" if own else ""
        self._write(f"model    {name}{demonstration}")
        self._write(f"task     {_task(session)}")
        self._write(
            f"step     {_of_step(session)}, lr {config.learning.lr:g}, LoRA rank {config.lora.rank}"
        )
        if note := experts_note(session.policy.model):
            self._write(f"adapters {note}")
        self._write(f"tokens   {_amount(session)}")
        if not session.step and session.demonstrations is None:
            self._write(f"time     {_expected(session)}")
        threads = f", BLAS threads: {plan.threads}" if plan.threads else ""
        self._write(f"machine  {plan.reason}{threads}")
        if session.step:
            self._write(f"resumed  after step {session.step}")
        self._last_line = time.monotonic()
        self._begin_part()

    def evaluating(self, step: int) -> None:
        """Show the evaluation that begins."""
        when = "before training" if step == 0 else f"after step {step}"
        self._evaluating = f"evaluating {when}"
        self._begin_part()
        if self._line is not None:
            self._line.refresh()

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Print one line per evaluation, and after the first how long the run will take."""
        when = "before training" if step == 0 else f"after step {step}"
        self._evaluating = None
        self._write(f"{when}: {_score(evaluation)}")
        assert self._session is not None
        left = self._session.forecast.left_s(step, self._session.trained_s)
        if step == 0 and left:
            self._write(f"time     {self._duration(left)}")
        self._begin_part()

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """Show the step, or print a plain line at intervals."""
        assert self._session is not None
        self._metrics = metrics
        step, now = metrics["step"], time.monotonic()
        self._begin_part()
        if self._line is not None and self._line.terminal:
            self._line.refresh()
        elif now - self._last_line > STEP_EVERY_S or step == self._session.config.run.steps:
            self._last_line = now
            told = [*self._left(step), *self._facts()]
            self._write(f"step {step}/{self._session.config.run.steps}  {', '.join(told)}")

    def warn(self, line: str) -> None:
        """Print a warning without breaking the line."""
        self._write(f"warning: {line}")

    def end(self) -> None:
        """Remove the line."""
        if self._line is not None:
            self._line.close()
        self._line = None

    def finish(self, result: RunResult) -> None:
        """Print the result: before and after, three completions of each, next commands."""
        if result.base and result.adapter and result.base.n:
            click.echo("\n" + comparison(result.base, result.adapter))
        click.echo(verdict(read_run(result.folder)))
        click.echo(
            f"{result.steps} steps in {result.train_s:.0f} s; everything is in {result.folder}"
        )
        click.echo(memory(result))
        supervised = self._session is not None and self._session.demonstrations is not None
        click.echo("\n" + next_command(result, supervised=supervised))

    def _begin_part(self) -> None:
        assert self._clock is not None
        self._clock.forget()
        self._since = time.monotonic()

    def _picture(self) -> Picture:
        """Describe what goes on now; called from the thread of the line."""
        assert self._clock is not None
        work, seconds = self._clock.read()
        if self._session is None:
            return picture_of(work, seconds)
        passed = time.monotonic() - self._since
        if self._evaluating is not None:
            return replace(picture_of(work, passed), title=self._evaluating)
        done = self._metrics["step"] if self._metrics else self._session.step
        steps = self._session.config.run.steps
        if done >= steps:
            return Picture("finishing", facts=[elapsed(passed)])
        told = [*self._left(done), *self._facts()]
        if work is not None:
            told.insert(2, _doing(work, passed))
        return Picture(f"step {done + 1}/{steps}", done, steps, told)

    def _facts(self) -> list[str]:
        if self._metrics is None or self._session is None:
            return []
        return _facts(self._metrics, supervised=self._session.demonstrations is not None)

    def _left(self, step: int) -> list[str]:
        assert self._session is not None
        left = self._session.forecast.left_s(step, self._session.trained_s)
        if left is None:
            return []
        return [f"{elapsed(max(0.0, left - (time.monotonic() - self._since)))} left"]

    def _duration(self, left: float) -> str:
        """Say how long the rest takes, and above an hour what would make it shorter."""
        assert self._session is not None
        forecast, config = self._session.forecast, self._session.config
        assert forecast.step_s is not None
        count = forecast.evaluations_left(0)
        rest = f", {count} evaluation{'s' if count > 1 else ''} of {about(forecast.evaluation_s)}"
        text = f"about {about(left)}: {config.run.steps} steps of {about(forecast.step_s)}"
        text += rest if count else ""
        if left < LONG_S:
            return text
        return f"{text}. Shorter: --minutes 60, fewer --steps, or fewer task.eval_prompts"

    def _write(self, text: str) -> None:
        if self._line is not None:
            self._line.write(text)
        else:
            click.echo(text, err=True)


def _task(session: Session) -> str:
    """Describe what is learned from, and what is measured."""
    task, given = session.task, session.demonstrations
    if given is None:
        return f"{task.name}: {task.description}"
    measured = f"; measured on {task.name}" if session.held_out else ""
    return f"{given.about}{measured}"


def _of_step(session: Session) -> str:
    """Describe what a step learns from."""
    count, given = session.config.rollout.prompts_per_step, session.demonstrations
    if given is None:
        each, most = completions(session.sampler.shape), session.plan.max_completion_tokens
        return f"{count} prompts x {each} of at most {most} tokens"
    epochs = count * session.config.run.steps / len(given.training)
    return (
        f"{count} of {len(given.training)} worked examples; {session.config.run.steps} steps see "
        f"each {epochs:.1f} times"
    )


def _amount(session: Session) -> str:
    """Say how many tokens a step learns from, at most or on average."""
    given = session.demonstrations
    if given is None:
        return amount(session.config, session.sampler.shape, session.plan)
    prompt, completion = given.mean
    return f"a worked example has {prompt:.0f} tokens of a prompt and {completion:.0f} after it"


def amount(config: RunConfig, shape: Shape, plan: MemoryPlan) -> str:
    """Say how many tokens a step and a run sample at most."""
    step = config.rollout.prompts_per_step * shape.leaves * shape.rounds
    step *= plan.max_completion_tokens
    return f"at most {step:,} a step, {step * config.run.steps:,} in {config.run.steps} steps"


def expectation(seconds: float | None) -> str:
    """Say how long a run takes at the speed of an earlier one; None: there was none."""
    if seconds is None:
        return "not known yet: the base evaluation of a run measures this model's speed here"
    return f"about {about(seconds)} at the speed of the last run of this model here"


def _expected(session: Session) -> str:
    from localrl.training import speeds

    sizes = session.request.sizes
    speed = speeds.recall(sizes, session.policy.engine.name)
    return expectation(speed and speeds.expected_s(session.config, session.plan, sizes, speed))


def about(seconds: float) -> str:
    """Write a duration in words, with two digits or so."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _doing(work: Work, seconds: float) -> str:
    """Describe the part of a step that goes on."""
    counts = f" {work.done:,}/{work.total:,}" if work.total else ""
    return f"{work.name}{counts} {elapsed(seconds)}"


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


def next_command(result: RunResult, *, supervised: bool = False) -> str:
    """Suggest the next commands to run; after a supervised start, training that goes on from it."""
    folder = shlex.quote(str(result.folder))
    more = f"\n      localrl train --adapter {folder} --task TASK ..." if supervised else ""
    return (
        f"adapter: {result.folder / 'adapter'} (mlx-lm format)\n"
        f"next: localrl chat {folder}             ask the trained model\n"
        f"      localrl show {folder} --report    curves, groups and answers as a page\n"
        f"      localrl export {folder} --fused   a complete model\n"
        f"      localrl push {folder} USER/NAME   the adapter on the Hub{more}"
    )


def _completion(shown: Shown) -> str:
    verdict = "no reward" if shown.reward is None else f"reward {shown.reward:g}"
    return f"{printable(shown.completion)}   [{verdict}]"


def _score(evaluation: Evaluation) -> str:
    loss = facts.loss_words(evaluation.loss, evaluation.demonstrations)
    if loss and not evaluation.n:
        return loss
    low, high = evaluation.ci95 or (None, None)
    return (
        f"pass@1 {_number(evaluation.pass_at_1)} ({_number(low)} to {_number(high)}) "
        f"on {evaluation.n} held-out prompts, {sampled_at(evaluation.temperature)}"
        f"{f'; {loss}' if loss else ''}"
    )


def _facts(metrics: Mapping[str, Any], *, supervised: bool) -> list[str]:
    """Facts of a step, the most important first. supervised: True if completions are given."""
    rate = metrics["rollout/tokens"] / metrics["step_time"]
    memory = metrics["memory/resident_bytes"] or metrics["memory/peak_bytes"]
    if supervised:
        loss = f"loss {_number(metrics['loss'])}"
        return [loss, f"{rate:.0f} tok/s", f"{memory / 2**30:.2f} GiB"]
    return [
        f"reward {_number(metrics['reward'])}",
        f"{rate:.0f} tok/s",
        f"{memory / 2**30:.2f} GiB",
        f"informative {metrics['rollout/informative_groups']}/{metrics['rollout/groups']}",
    ]


def _bytes(size: int | None) -> str:
    from localrl.memory.limit import show

    return "unknown" if size is None else show(size)


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else fixed(value, digits)
