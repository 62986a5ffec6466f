"""`localrl tasks`: what there is to learn, and what the model gets to see of it."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def tasks() -> None:
    """List the tasks, or look at one."""


@tasks.command("list")
def list_all() -> None:
    """Name the built-in tasks."""
    from localrl.tasks.builtin import list_tasks

    for name, description in list_tasks().items():
        click.echo(f"{name:10}{description}")


@tasks.command()
@click.argument("name")
@click.option("-n", "count", type=click.IntRange(1), default=3, help="Examples to show.")
@click.option("--model", metavar="DIR", help="Render for this model; without it the embedded one.")
def show(name: str, count: int, model: str | None) -> None:
    """Show training examples as the model sees them, with their answers and rewards.

    \b
      localrl tasks show steps
      localrl tasks show sums -n 10
    """
    from localrl.cli.console import printable
    from localrl.embedded import embedded_model_path
    from localrl.policy.tokenizer import load_tokenizer
    from localrl.tasks.builtin import load_task

    task = load_task(name, train_prompts=0)
    tokenizer = load_tokenizer(Path(model) if model else embedded_model_path())
    parts = ", ".join(f"{spec.name} x {spec.weight:g}" for spec in task.rewards)
    click.echo(f"{task.name}: {task.description}\nrewards: {parts}")
    for index in range(count):
        example = task.train(index)
        prompt = tokenizer.encode(example.messages)
        click.echo(f"\n{example.id}  ({len(prompt)} tokens)")
        click.echo(f"  model sees  {printable(tokenizer.render(example.messages))!r}")
        click.echo(f"  answer      {example.answer}")
