"""`localrl tasks`: list tasks, and show them as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from localrl.cli.options import columns
from localrl.errors import DataError

if TYPE_CHECKING:
    from localrl.diagnostics.inspect_task import TaskReport
    from localrl.policy.tokenizer import Tokenizer
    from localrl.records import Example
    from localrl.rewards.scoring import Scorer
    from localrl.tasks.base import Task
    from localrl.tasks.environments import Environments


@click.group()
def tasks() -> None:
    """List tasks, inspect one, or check your own."""


@tasks.command("list")
def list_all() -> None:
    """List the built-in tasks."""
    from localrl.tasks.builtin import list_tasks

    for name, description in list_tasks().items():
        click.echo(f"{name:12}{description}")


def _options(command):
    """Add the options shared by `show` and `check`."""
    for option in (
        click.option("--model", metavar="MODEL", help="Render for this model; default: embedded."),
        click.option(
            "--reward", "rewards", multiple=True, metavar="REWARD", help="As for `train`."
        ),
        columns,
        click.option("--environment", metavar="ENV", help="As for `train`."),
        click.option("--tool", "tools", multiple=True, metavar="TOOL", help="As for `train`."),
        click.option(
            "-n", "count", type=click.IntRange(0), default=3, help="Number of examples to show."
        ),
        click.argument("name"),
    ):
        command = option(command)
    return command


@tasks.command()
@_options
def show(name: str, count: int, **options: Any) -> None:
    """Show training examples as the model sees them, with their answers.

    \b
      localrl tasks show steps
      localrl tasks show problems.jsonl -n 10 --model path/to/model
    """
    with _opened(name, **options) as opened:
        _head(opened)
        _tell_unknown(opened, count, named=options["model"] is not None)
        _examples(opened, count)


@tasks.command()
@_options
def check(name: str, count: int, **options: Any) -> None:
    """Check a task before training on it: prompts, held-out rows, gold answers, reward time.

    Ends with exit code 4 if no gold answer scores.

    \b
      localrl tasks check problems.jsonl --reward my_rewards.py:score --model path/to/model
    """
    from localrl.config import RunConfig
    from localrl.diagnostics.inspect_task import inspect_task
    from localrl.tasks.loading import is_data
    from localrl.training.prompt_checks import warn_of_prompts
    from localrl.training.reward_checks import check_columns

    rollout = RunConfig().rollout
    with _opened(name, **options) as opened:
        check_columns(opened.task, opened.task.evaluation(1), opened.scorer)
        report = inspect_task(
            opened.task,
            opened.scorer,
            opened.tokenizer,
            max_prompt_tokens=rollout.max_prompt_tokens,
            per_step=rollout.prompts_per_step * rollout.completions,
            gold=is_data(name),
            environments=opened.environments,
        )
        warn_of_prompts(_shown(opened.task, report.training), opened.tokenizer, _warn)
        _head(opened)
        for line in _lines(report, rollout.max_prompt_tokens):
            click.echo(line)
        _examples(opened, count)
    if report.learns_nothing:
        raise DataError(
            f"A run on {name} would learn nothing: {report.learns_nothing}. If another column has "
            "the answers, name it with --columns answer=COLUMN; if a completion has to say more "
            "than the answer, accept the answer alone too, or choose another --reward."
        )


class _Opened(NamedTuple):
    """An opened task and what is needed to show it."""

    task: Task
    scorer: Scorer
    tokenizer: Tokenizer
    environments: Environments | None


@contextmanager
def _opened(
    name: str,
    rewards: Sequence[str],
    model: str | None,
    columns: tuple[str, ...],
    environment: str | None,
    tools: tuple[str, ...],
) -> Iterator[_Opened]:
    """Open the task, its rewards, the model's tokenizer and its environments.

    Data without a reward and an environment gets `accuracy`.
    """
    from localrl.policy.loading import find_model
    from localrl.policy.tokenizer import load_tokenizer
    from localrl.processes.worker import Worker
    from localrl.rewards.catalog import parse_rewards
    from localrl.rewards.scoring import Scorer
    from localrl.settings import TaskConfig
    from localrl.tasks.files import OnePrompt
    from localrl.tasks.loading import is_data, open_task, with_environments

    config = TaskConfig(name=name, columns=columns, environment=environment, tools=tools)
    plain = is_data(name) and environment is None
    specs = parse_rewards(rewards or (["accuracy"] if plain else []))
    with Worker(
        time_limit_s=config.reward_timeout_s,
        memory_limit_bytes=config.reward_memory_mb * 2**20,
    ) as worker:
        try:
            found = open_task(config, specs, worker)
        except OnePrompt as error:
            _warn(str(error))
            found = open_task(replace(config, eval_prompts=0), specs, worker)
        task, environments = with_environments(config, found, worker, _warn)
        tokenizer = load_tokenizer(find_model(model))
        if environments is not None:
            environments.connect(tokenizer)
        yield _Opened(task, Scorer(task.rewards, worker, _warn), tokenizer, environments)


def _warn(line: str) -> None:
    click.echo(f"warning: {line}", err=True)


def _head(opened: _Opened) -> None:
    task = opened.task
    parts = ", ".join(f"{spec.name} x {spec.weight:g}" for spec in task.rewards)
    click.echo(f"{task.name}: {task.description}\nrewards: {parts}")
    for kind in opened.environments.kinds.values() if opened.environments else ():
        called = ", ".join(schema["function"]["name"] for schema in kind.schemas)
        what = f"the model may call {called}" if called else "text-only turns"
        click.echo(f"environment: {kind.name}, {what}")


def _lines(report: TaskReport, most: int) -> Iterator[str]:
    least, median, longest = report.prompt_tokens
    training = report.training or "endless"
    yield f"prompts: {training} to train on, {report.held_out} held out"
    yield f"length: {least} to {longest} tokens, median {median}"
    if report.too_long:
        yield (
            f"  {report.too_long} are longer than {most} tokens: raise rollout.max_prompt_tokens, "
            "or set task.filter_overlong_prompts"
        )
    if report.repeated:
        yield f"repeated: {report.repeated} prompts occur more than once"
    if report.unknown:
        yield f"unreadable: this model has no token for {report.unknown!r}"
    if report.unanswered:
        yield f"gold answers: {report.unanswered} rows have none"
    if report.gold:
        right = len(report.gold) - len(report.wrong)
        yield f"gold answers: {right} of {len(report.gold)} score 1"
    for scored in report.wrong[:3]:
        parts = {name: values[0] for name, values in scored.parts.items()}
        yield f"  {scored.group.example.id}: {scored.group.example.answer!r:.60} gets {parts}"
    if report.reward_s is not None:
        yield f"reward time: {1000 * report.reward_s:.1f} ms for one step's completions"


def _tell_unknown(opened: _Opened, count: int, *, named: bool) -> None:
    """Say which characters of the examples the model has no token for."""
    from localrl.diagnostics.inspect_task import unknown

    missing = unknown(opened.tokenizer, _shown(opened.task, count))
    if missing:
        which = "this model" if named else "the embedded model"
        todo = "" if named else "; see them as another reads them with --model MODEL"
        click.echo(f"unreadable: {which} has no token for {missing!r}{todo}")


def _shown(task: Task, count: int) -> list[Example]:
    return [task.train(index) for index in range(min(count, task.train_size or count))]


def _examples(opened: _Opened, count: int) -> None:
    from localrl.diagnostics.inspect_task import encode
    from localrl.utils.text import printable

    task, tokenizer = opened.task, opened.tokenizer
    examples = _shown(task, count)
    for example, prompt in zip(
        examples, encode(examples, tokenizer, opened.environments), strict=True
    ):
        click.echo(f"\n{example.id}  ({len(prompt)} tokens)")
        click.echo(f"  model sees  {printable(tokenizer.inner.decode(list(prompt)))!r}")
        click.echo(f"  answer      {printable(str(example.answer))}")
