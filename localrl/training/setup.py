"""Opens a run, in the order in which things can fail; computes nothing until all is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from localrl import backend
from localrl.config import RunConfig, keys
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.gather import gather
from localrl.errors import ConfigError
from localrl.learning.objectives import describe
from localrl.memory.adapting import MemoryMonitor
from localrl.memory.plan import changes
from localrl.processes.child import Restart
from localrl.processes.heartbeat import Heartbeat
from localrl.runs import dashboards
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.folder import RunFolder, default_run_path, open_run, package_versions
from localrl.runs.health import Health
from localrl.runs.logs import read_jsonl
from localrl.runs.null_folder import NullRunFolder
from localrl.training import speeds
from localrl.training.components import Components, check_sandbox, open_components
from localrl.training.forecast import Forecast
from localrl.training.given import NOTHING, Given
from localrl.training.resolved import resolve
from localrl.training.resuming import PreviousRun, continued, day_of_run, reopen
from localrl.training.session import Progress, Session
from localrl.training.state import broadcast, sources_of

AGREED = ("group_size", "max_completion_tokens")
"""Plan fields that the machine with the least memory decides for all."""
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")


@contextmanager
def open_session(
    config: RunConfig,
    *,
    overwrite: bool,
    resume: bool,
    progress: Progress,
    heartbeat: Heartbeat,
    restart: Restart | None = None,
    ranks: Ranks = ALONE,
    given: Given = NOTHING,
) -> Iterator[Session]:
    """Open everything that the run needs. restart: the supervisor's note on the previous process.

    Only rank 0 opens or resumes a run folder; the others start with its state. given: rows and
    rewards that the settings cannot name.

    Raises: ConfigError or DataError for what cannot work; CheckpointError if a run cannot be
    resumed.
    """
    dashboards.check(config.run.report_to)
    with ExitStack() as stack:
        progress.start(heartbeat)
        stack.callback(progress.end)
        config = _dated(config, ranks, resume=resume)
        resumes = resume and ranks.is_main
        found = continued(config) if resumes else None
        resolved = resolve(found or config, starts=found is None)
        config, warn = resolved.config, progress.warn
        before = stack.enter_context(reopen(config, warn)) if resumes else None
        plan = before.plan_after(restart, resolved.shape) if before else None
        components = stack.enter_context(
            open_components(
                resolved, warn=warn, heartbeat=heartbeat, plan=plan, given=given, ranks=ranks
            )
        )
        config = components.config  # with what the task changed
        plans = _agree_on_plan(components, ranks)
        sandbox = check_sandbox(config, components.task, warn)
        sources = sources_of(components)
        if before:
            before.check_sources(sources)  # before anything of the run is changed
        run = before.run if before else NullRunFolder()
        if ranks.is_main and not before:
            run = stack.enter_context(_open_folder(config, overwrite))
        run.write_config(config.to_toml())
        run.write_plan(components.plan)
        if not before:
            _warn_reduced_plan(components, run, warn)
        _record_start(run, components, sandbox)
        session = Session(
            **vars(components),
            run=run,
            progress=progress,
            checkpoints=Checkpoints(run.path / "checkpoints", warn),
            sources=sources,
            health=Health(config, {spec.name: spec.weight for spec in components.task.rewards}),
            watch=MemoryMonitor(components.plan),
            forecast=Forecast.of(config, evaluates=components.evaluates),
            ranks=ranks,
        )
        session.tell_checks()
        if before:
            _restore(before, session, restart)
        if ranks.size > 1:
            broadcast(session)
            run.event("ranks", names=list(ranks.names), plans=plans)
        if ranks.is_main:
            session.dashboards = stack.enter_context(_dashboards(session))
        if restart:
            run.event("restarted", **vars(restart), plan=vars(components.plan))
        heartbeat.on_sleep = lambda seconds: run.event("slept", seconds=round(seconds))
        if note := backend.describe().note:
            warn(note)
        progress.begin(session)
        stack.callback(speeds.remember, session)
        yield session


def _record_start(
    run: RunFolder | NullRunFolder, components: Components, sandbox: str | None
) -> None:
    """Record what the run computes with: engine, floats, objective, and where rewards are made."""
    config, engine, given = components.config, components.policy.engine, components.demonstrations
    if sandbox:
        run.event("code_rewards", sandbox=sandbox)
    if components.judges:
        run.event("judges", found=components.judges)
    kernels = None if engine.kernels is None else str(engine.kernels)
    run.event("engine", name=engine.name, kernels=kernels, device=backend.describe().device)
    if floats := components.policy.floats:
        run.event("dtype", **vars(floats))
    completions, supervised = config.rollout.completions, given is not None
    run.event("objective", **describe(config.learning, completions, supervised=supervised))
    if given is not None:
        run.event("demonstrations", about=given.about)


def _dated(config: RunConfig, ranks: Ranks, *, resume: bool) -> RunConfig:
    """Fix the day that chat templates see: that on which the run began, on rank 0."""
    day = config.model.template_date
    if day is None and resume and ranks.is_main:
        day = day_of_run(config)
    day = gather(ranks, day or date.today().isoformat())[0]
    return config.replace("model.template_date", day)


def _restore(before: PreviousRun, session: Session, restart: Restart | None) -> None:
    """Restore the session to where the run stood."""
    before.continue_in(session)
    if restart and restart.smaller:
        session.watch = MemoryMonitor(session.plan)  # never return to the plan that failed
    for record in read_jsonl(session.folder / "metrics.jsonl"):
        session.health.see(record)  # warnings about these were given before


def _agree_on_plan(components: Components, ranks: Ranks) -> list[dict[str, Any]]:
    """Give all ranks the smallest group size and completion length; return the plan of each.

    Raises: ConfigError if there are fewer prompts than ranks.
    """
    prompts = components.config.rollout.prompts_per_step
    if prompts < ranks.size:
        raise ConfigError(
            f"rollout.prompts_per_step is {prompts}, fewer than the {ranks.size} ranks, each of "
            f"which samples whole groups. Set it to {ranks.size} or a multiple of it."
        )
    plans = gather(ranks, vars(components.plan))
    least: dict[str, int] = {name: min(plan[name] for plan in plans) for name in AGREED}
    agreed = replace(components.plan, **least)
    if agreed != components.plan:
        components.use(agreed)
        components.sampler.start_rule()
    return plans


def _warn_reduced_plan(
    components: Components, run: RunFolder | NullRunFolder, warn: Callable[[str], None]
) -> None:
    """Warn when memory gives each prompt less than the configuration asks for."""
    given = changes(components.request.plan, components.plan)
    if "dequantise" in given:
        warn(
            "to fit into memory, the weights stay packed, which makes a CPU many times slower; "
            "a higher --memory-limit would let them be unpacked"
        )
    less = {name: list(given[name]) for name in ("group_size", "max_completion_tokens")
            if name in given}  # fmt: skip
    if less:
        run.event("plan", step=0, reason=components.plan.reason, changed=less)
        sizes = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in less.items())
        warn(f"to fit into memory, this run uses {sizes}")


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
    wish, stem = config.run.out, Path(config.task.name).stem
    if config.task.demonstrations is not None:
        stem = f"sft-{Path(config.task.demonstrations).stem}"
    out = Path(wish) if wish else default_run_path(Path("runs"), stem)
    versions = package_versions(PACKAGES)
    machine = backend.describe()
    return open_run(
        out,
        overwrite=overwrite,
        versions={**versions, "device": machine.device, "blas": machine.blas},
        rollout_log_limit=config.run.rollout_log_limit,
    )
