"""Opening a run, in the order in which things can fail; nothing is computed before all is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from localrl import backend
from localrl.config import RunConfig, keys
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.gather import gather
from localrl.errors import ConfigError
from localrl.learning.objectives import describe
from localrl.memory.adapting import Watch
from localrl.memory.plan import changes
from localrl.processes.child import Restart
from localrl.processes.heartbeat import Pulse
from localrl.runs import dashboards
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.folder import RunFolder, default_run_path, open_run, package_versions
from localrl.runs.health import Health
from localrl.runs.logs import read_jsonl
from localrl.runs.nowhere import Nowhere
from localrl.training.components import Parts, check_sandbox, open_parts, settle
from localrl.training.session import Progress, Session
from localrl.training.state import Before, reopen, share, sources_of

AGREED = ("group_size", "max_completion_tokens")
"""What the machine with the least memory decides for all."""
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")


@contextmanager
def open_session(
    config: RunConfig,
    *,
    overwrite: bool,
    resume: bool,
    progress: Progress,
    pulse: Pulse,
    restart: Restart | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Session]:
    """Open everything that the run needs. restart: what a supervisor says of the last process.

    Only rank 0 opens a run folder, or goes on with one; the others begin with its state.

    Raises: ConfigError or DataError, saying what cannot work; CheckpointError when a run cannot be
    resumed.
    """
    dashboards.check(config.run.report_to)
    settled = settle(config)
    config, warn = settled.config, progress.warn
    with ExitStack() as stack:
        resumes = resume and ranks.leads
        before = stack.enter_context(reopen(config, warn)) if resumes else None
        plan = before.plan_after(restart, settled.shape) if before else None
        parts = stack.enter_context(
            open_parts(settled, warn=warn, pulse=pulse, plan=plan, ranks=ranks)
        )
        plans = _agree(parts, ranks)
        sandbox = check_sandbox(config, parts.task, warn)
        run = before.run if before else Nowhere()
        if ranks.leads and not before:
            run = stack.enter_context(_open_folder(config, overwrite))
        run.write_config(config.to_toml())
        run.write_plan(parts.plan)
        if not before:
            _tell_less(parts, run, warn)
        if sandbox:
            run.event("code_rewards", sandbox=sandbox)
        engine = parts.policy.engine
        kernels = None if engine.kernels is None else str(engine.kernels)
        run.event("engine", name=engine.name, kernels=kernels)
        run.event("objective", **describe(config.learning, config.rollout.completions))
        session = Session(
            **vars(parts),
            run=run,
            progress=progress,
            checkpoints=Checkpoints(run.path / "checkpoints", warn),
            sources=sources_of(parts.model_folder, parts.task, parts.held_out),
            health=Health(config, {spec.name: spec.weight for spec in parts.task.rewards}),
            watch=Watch(parts.plan),
            ranks=ranks,
        )
        if before:
            _go_on(before, session, restart)
        if ranks.size > 1:
            share(session)
            run.event("ranks", names=list(ranks.names), plans=plans)
        if ranks.leads:
            session.dashboards = stack.enter_context(_dashboards(session))
        if restart:
            run.event("restarted", **vars(restart), plan=vars(parts.plan))
        pulse.on_sleep = lambda seconds: run.event("slept", seconds=round(seconds))
        if note := backend.describe().note:
            warn(note)
        progress.begin(session)
        yield session


def _go_on(before: Before, session: Session, restart: Restart | None) -> None:
    """Put the session where the run stood."""
    before.continue_in(session)
    if restart and restart.smaller:
        session.watch = Watch(session.plan)  # never back to the plan that has died
    for record in read_jsonl(session.folder / "metrics.jsonl"):
        session.health.see(record)  # it was warned of these


def _agree(parts: Parts, ranks: Ranks) -> list[dict[str, Any]]:
    """Let all ranks use the group size and the length of the smallest; the plan of each.

    Raises: ConfigError when there is not a prompt for each.
    """
    prompts = parts.config.rollout.prompts_per_step
    if prompts < ranks.size:
        raise ConfigError(
            f"rollout.prompts_per_step is {prompts}: that is not one for each of {ranks.size} "
            f"ranks, which sample whole groups. Set it to {ranks.size} or a multiple."
        )
    plans = gather(ranks, vars(parts.plan))
    least: dict[str, int] = {name: min(plan[name] for plan in plans) for name in AGREED}
    agreed = replace(parts.plan, **least)
    if agreed != parts.plan:
        parts.use(agreed)
        parts.sampler.start_rule()
    return plans


def _tell_less(parts: Parts, run: RunFolder | Nowhere, warn: Callable[[str], None]) -> None:
    """Say aloud where memory leaves less to each prompt than the configuration asks for."""
    given = changes(parts.asked.plan, parts.plan)
    if "dequantise" in given:
        warn(
            "to fit into memory the weights stay packed, with which a CPU takes many times as "
            "long; a higher --memory-limit would let them be unpacked"
        )
    less = {name: list(given[name]) for name in ("group_size", "max_completion_tokens")
            if name in given}  # fmt: skip
    if less:
        run.event("plan", step=0, reason=parts.plan.reason, changed=less)
        sizes = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in less.items())
        warn(f"to fit into memory this run has {sizes}")


@contextmanager
def _dashboards(session: Session) -> Iterator[list[dashboards.Dashboard]]:
    config = session.config
    settings = {key: config.value(key) for key in keys()}
    opened = dashboards.start(config.run.report_to, session.folder, settings, session.step)
    try:
        yield opened
    finally:
        dashboards.finish(opened, session.progress.warn)


def _open_folder(config: RunConfig, overwrite: bool) -> RunFolder:
    wish = config.run.out
    out = Path(wish) if wish else default_run_path(Path("runs"), Path(config.task.name).stem)
    versions = package_versions(PACKAGES)
    machine = backend.describe()
    return open_run(
        out,
        overwrite=overwrite,
        versions={**versions, "device": machine.device, "blas": machine.blas},
        rollout_log_limit=config.run.rollout_log_limit,
    )
