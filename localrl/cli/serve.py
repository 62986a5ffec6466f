"""`localrl serve`: the model behind an OpenAI-compatible address on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localrl.cli.eval import configure
from localrl.cli.options import device, set_option
from localrl.errors import ConfigError
from localrl.utils.hosts import LOOPBACK

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.serving.model import Names

PORT = 8080
MOST_ROWS = 32
"""Most answers decoded at once."""
CACHE_SHARE = 4
"""A quarter of the memory limit may hold conversations that go on."""


@click.command()
@click.argument("target", required=False, metavar="[RUN|MODEL]")
@click.option("--quantize", type=int, metavar="BITS", help="Quantise the model to 4 or 8 bits.")
@click.option("--adapter", metavar="DIR", help="Serve the adapter in this folder too.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True)
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen on.")
@click.option(
    "--temperature",
    type=float,
    help="Temperature of requests that name none; default: as in training.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Longest answer to requests that name no length; default: as in training.",
)
@device
@set_option("As for `train`.")
def serve(
    target: str | None,
    port: int,
    host: str,
    max_tokens: int | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve a model to programs that speak OpenAI's API, with and without a run's adapter.

    Only this machine is answered. Nothing is loaded but what is named here.

    \b
      localrl serve runs/steps-1          the run's model under two names
      localrl serve path/to/model         a model, GGUF file or user/name
    """
    from localrl import backend

    run, model = _split(target)
    config = configure(run, settings, {**options, "model": model})
    # Before mlx-lm is imported: it makes a stream on the device of that moment.
    backend.compute_on_cpu(config.model.on_cpu)
    from localrl.display.line import showing

    with showing("loading the model"):
        from localrl.serving.model import ServedModel, ServeLimits
        from localrl.training.memory_plan import make_plan
        from localrl.training.resolved import load, local_plan_request, open_policy, resolve

        resolved = resolve(config)
        plan = make_plan(config, local_plan_request(resolved, trains=False))
        limits = ServeLimits(
            max_tokens=max_tokens or config.rollout.max_completion_tokens,
            temperature=config.eval_temperature,
            rows=min(plan.decode_rows, MOST_ROWS),
            cache_bytes=plan.limit_bytes and plan.limit_bytes // CACHE_SHARE,
        )
        policy = open_policy(resolved, load(resolved), plan)
        served = ServedModel(policy, _names(config, run), limits)
    if config.task.system and run is not None:
        click.echo(f"trained with the system message {config.task.system!r:.200}", err=True)
    from localrl.serving.server import serve as serve_model

    serve_model(served, host, port, click.echo)


def _split(target: str | None) -> tuple[Path | None, str | None]:
    """Return the run or else the model that was named."""
    if target is None:
        return None, None
    path = Path(target).expanduser()
    if (path / "run.json").is_file() or (path / "config.toml").is_file():
        return path, None
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} is an adapter. Name its model, and it with --adapter {path}.")
    return None, target


def _names(config: RunConfig, run: Path | None) -> Names:
    """Return the names under which the model is asked: the model's own, and the run's."""
    from localrl.embedded import EMBEDDED_MODEL
    from localrl.serving.model import Names

    name = config.model.path or EMBEDDED_MODEL
    base = Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name
    base = base.removesuffix(".gguf")
    if config.lora.adapter is None:
        return Names(base, None)
    folder = Path(config.lora.adapter).expanduser().resolve()
    adapter = folder.parent.name if folder.name == "adapter" else folder.name
    if run is not None:
        adapter = run.resolve().name
    return Names(base, f"{base}-adapter" if adapter in (base, "") else adapter)
