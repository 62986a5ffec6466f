"""Opening a run, in the order in which things can fail; nothing is computed before all is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from localrl import backend
from localrl.config import RunConfig, keys
from localrl.learning.objectives import describe
from localrl.memory.adapting import Watch
from localrl.memory.plan import changes
from localrl.parts import Parts, check_sandbox, open_parts, settle
from localrl.pulse import Pulse
from localrl.resuming import reopen, sources_of
from localrl.runs import dashboards
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.folder import RunFolder, default_run_path, open_run, package_versions
from localrl.runs.health import Health
from localrl.runs.logs import read_jsonl
from localrl.runs.supervised import Restart
from localrl.session import Progress, Session

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
) -> Iterator[Session]:
    """Open everything that the run needs. restart: what a supervisor says of the last process.

    Raises: ConfigError or DataError, saying what cannot work; CheckpointError when a run cannot be
    resumed.
    """
    dashboards.check(config.run.report_to)
    settled = settle(config)
    config, warn = settled.config, progress.warn
    with ExitStack() as stack:
        before = stack.enter_context(reopen(config, warn)) if resume else None
        plan = before.plan_after(restart, settled.shape) if before else None
        parts = stack.enter_context(open_parts(settled, warn=warn, pulse=pulse, plan=plan))
        sandbox = check_sandbox(config, parts.task, warn)
        run = before.run if before else stack.enter_context(_open_folder(config, overwrite))
        run.write_config(config.to_toml())
        run.write_plan(parts.plan)
        if not before:
            _tell_less(parts, run, warn)
        if sandbox:
            run.event("code_rewards", sandbox=sandbox)
        run.event("objective", **describe(config.learning, config.rollout.completions))
        session = Session(
            **vars(parts),
            run=run,
            progress=progress,
            checkpoints=Checkpoints(run.path / "checkpoints", warn),
            sources=sources_of(parts.model_folder, parts.task, parts.held_out),
            health=Health(config, {spec.name: spec.weight for spec in parts.task.rewards}),
            watch=Watch(parts.plan),
        )
        if before:
            before.continue_in(session)
            if restart and restart.smaller:
                session.watch = Watch(session.plan)  # never back to the plan that has died
            for record in read_jsonl(run.path / "metrics.jsonl"):
                session.health.see(record)  # it was warned of these
        session.dashboards = stack.enter_context(_dashboards(session))
        if restart:
            run.event("restarted", **vars(restart), plan=vars(parts.plan))
        pulse.on_sleep = lambda seconds: run.event("slept", seconds=round(seconds))
        if note := backend.describe().note:
            warn(note)
        progress.begin(session)
        yield session


def _tell_less(parts: Parts, run: RunFolder, warn: Callable[[str], None]) -> None:
    """Say aloud where memory leaves less to each prompt than the configuration asks for."""
    given = changes(parts.asked.plan, parts.plan)
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
