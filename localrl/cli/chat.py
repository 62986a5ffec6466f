"""`localrl chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localrl.cli.eval import configure
from localrl.cli.options import device, set_option
from localrl.errors import ConfigError, DataError, LocalRLError
from localrl.utils.text import printable, sampled_at

if TYPE_CHECKING:
    from localrl.policy.model import Policy

HELP = "/base and /adapter switch models, /reset clears the conversation, /quit (or Ctrl-D) ends it"


@click.command()
@click.argument("run", required=False, metavar="[RUN]", type=click.Path(path_type=Path))
@click.option(
    "--model", metavar="MODEL", help="Folder, .gguf file or user/name; default: embedded."
)
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@click.option("--adapter", metavar="DIR", help="Use the adapter in this folder.")
@click.option("--system", metavar="TEXT", help="System message; default: the run's.")
@click.option(
    "--temperature",
    type=float,
    help="Sampling temperature; 0 takes the likeliest token; default: as in training.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Longest answer; default: as in training."
)
@click.option("--seed", type=click.IntRange(0), help="Seed, for reproducible answers.")
@device
@set_option("As for `train`.")
def chat(
    run: Path | None,
    settings: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Chat with a model, with or without a run's adapter.

    \b
      localrl chat runs/steps-1
      echo "What is 2+2?" | localrl chat --model DIR --temperature 0
    """
    from localrl import backend
    from localrl.backend import mx

    config = configure(run, settings, options)
    # Before mlx-lm is imported: it makes a stream on the device of that moment.
    backend.compute_on_cpu(config.model.on_cpu)
    from localrl.display.line import showing

    with showing("loading the model"):
        from localrl.policy.loading import shown_name
        from localrl.training.memory_plan import make_plan
        from localrl.training.resolved import load, local_plan_request, open_policy, resolve

        resolved = resolve(config)
        plan = make_plan(config, local_plan_request(resolved, trains=False))
        policy = open_policy(resolved, load(resolved), plan)
    if seed is not None:
        mx.random.seed(seed)
    talk = Talk(
        policy,
        temperature=config.eval_temperature,
        max_tokens=max_tokens or config.rollout.max_completion_tokens,
        system=config.task.system if system is None else system,
        has_adapter=resolved.adapter is not None,
    )
    name = shown_name(config.model.path, resolved.model_folder)
    name += ", with its adapter" if talk.adapter else ""
    click.echo(f"{printable(name)}, {sampled_at(talk.temperature)}. {HELP}", err=True)
    for line in _lines():
        if not talk.hear(line):
            break


def _lines() -> Iterator[str]:
    """Yield lines typed on a terminal or read from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (lets input() edit lines)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return


@dataclass
class Talk:
    """An interactive conversation with the model."""

    policy: Policy
    temperature: float
    max_tokens: int
    system: str | None
    has_adapter: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far, without the system message."""
    adapter: bool = field(init=False)
    """True if answers come from the model with its adapter."""

    def __post_init__(self) -> None:
        self.adapter = self.has_adapter

    def hear(self, line: str) -> bool:
        """Answer a line or run its command; return False when it ends the conversation."""
        text = line.strip()
        if text.startswith("/"):
            return self._command(text)
        if text:
            self._answer(text)
        return True

    def _command(self, text: str) -> bool:
        if text == "/adapter" and not self.has_adapter:
            click.echo("There is no adapter. Pass --adapter or a run.", err=True)
        elif text in ("/base", "/adapter"):
            self.adapter = text == "/adapter"
            click.echo(f"answers now come from the {text[1:]}", err=True)
        elif text == "/reset":
            self.messages.clear()
            click.echo("conversation cleared", err=True)
        elif text != "/quit":
            click.echo(f"Unknown command {printable(text)}: {HELP}", err=True)
        return text != "/quit"

    def _answer(self, text: str) -> None:
        head = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = self._stream([*head, *asked])
        except (ConfigError, DataError) as error:  # a template that refuses these messages
            click.echo(f"{printable(str(error))} (/reset clears the conversation)", err=True)
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> str:
        """Sample an answer and stream its text. Ctrl-C ends it early."""
        from contextlib import nullcontext

        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        from localrl.policy.lora import adapters_off

        tokenizer, model = self.policy.tokenizer, self.policy.model
        if unknown := tokenizer.unknown(messages):
            raise DataError(f"The model has no token for {unknown!r}.")
        prompt, pieces = list(tokenizer.encode(messages)), []
        try:
            with nullcontext() if self.adapter else adapters_off(model):
                for response in stream_generate(
                    model,
                    tokenizer.inner,
                    prompt,
                    max_tokens=self.max_tokens,
                    sampler=make_sampler(self.temperature),
                ):
                    pieces.append(response.text)
                    click.echo(printable(response.text), nl=False)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        except RuntimeError as error:  # raised by MLX itself
            raise LocalRLError(f"The model cannot answer: {error}.") from error
        click.echo()
        return "".join(pieces)
