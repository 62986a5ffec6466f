"""Opening a run, in the order in which things can fail; nothing is computed before all is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from localrl import backend
from localrl.checks import check
from localrl.config import RunConfig
from localrl.embedded import embedded_model_path
from localrl.errors import ConfigError
from localrl.learning.objectives import describe
from localrl.learning.tracker import Tracker
from localrl.learning.update import Updater
from localrl.memory.plan import make_plan
from localrl.policy.model import LoadedModel, Policy, load_model, make_policy, read_shape
from localrl.policy.precision import dense_bytes
from localrl.policy.scoring import group_logprobs
from localrl.records import Example, Group, MemoryPlan
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.code import allow_unsafe_code, check_code_rewards
from localrl.rewards.scoring import Scorer
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import make_shape
from localrl.rollouts.stops import make_stops
from localrl.runs.folder import RunFolder, default_run_path, open_run, package_versions
from localrl.sampling import Rescore, Sampler
from localrl.session import Progress, Session
from localrl.tasks.base import Task
from localrl.tasks.loading import open_task
from localrl.worker import Worker

SOME = 8
"""Examples that are looked at before a run."""

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")


@contextmanager
def open_session(config: RunConfig, *, overwrite: bool, progress: Progress) -> Iterator[Session]:
    """Open everything that the run needs.

    Raises: ConfigError or DataError, saying what cannot work.
    """
    rewards = parse_rewards(config.task.rewards, config.task.reward_weights or None)
    shape = make_shape(config.rollout)
    model_folder = Path(config.model.path) if config.model.path else embedded_model_path()
    read_shape(model_folder)
    allow_unsafe_code(config.task.unsafe_code)
    with ExitStack() as stack:
        worker = stack.enter_context(
            Worker(
                time_limit_s=config.task.reward_timeout_s,
                memory_limit_bytes=config.task.reward_memory_mb * 2**20,
            )
        )
        task = open_task(config.task, rewards, worker)
        check(config, shape, task)
        scorer = Scorer(task.rewards, worker, progress.warn, cut_reward=config.task.cut_reward)
        scorer.check(task.train(0).columns)
        sandbox = _check_sandbox(config, task, progress)
        held_out = task.evaluation(config.task.eval_prompts)
        loaded = load_model(model_folder)
        _check_vocabulary(loaded, task, held_out, model_folder)
        plan = _plan(config, loaded, model_folder)
        policy = _policy(config, loaded, plan)
        decoder = _decoder(config, policy, plan)
        updater = Updater(policy, config.learning, config.rollout.temperature, progress.warn)
        tracker = Tracker()
        run = stack.enter_context(_open_folder(config, overwrite))
        run.write_config(config.to_toml())
        run.write_plan(plan)
        if sandbox:
            run.event("code_rewards", sandbox=sandbox)
        run.event("objective", **describe(config.learning, config.rollout.completions))
        session = Session(
            config=config,
            model_folder=model_folder,
            task=task,
            policy=policy,
            plan=plan,
            scorer=scorer,
            decoder=decoder,
            sampler=Sampler(
                config, task, plan, decoder, tracker, shape, scorer.score, _rescore(updater, plan)
            ),
            updater=updater,
            tracker=tracker,
            run=run,
            progress=progress,
            held_out=held_out,
        )
        if note := backend.describe().note:
            progress.warn(note)
        progress.begin(session)
        yield session


def _check_sandbox(config: RunConfig, task: Task, progress: Progress) -> str | None:
    """What code in answers will run in; None when no reward of ours runs any.

    A user's reward may run some too, so that the unsafe flag is never passed over in silence.

    Raises: ConfigError when nothing holds it.
    """
    ours = any(spec.target.startswith("localrl.rewards.code:") for spec in task.rewards)
    if not ours and not config.task.unsafe_code:
        return None
    found = check_code_rewards()
    if found.startswith("UNSAFE"):
        progress.warn(found)
    return found


def _check_vocabulary(
    loaded: LoadedModel, task: Task, held_out: Sequence[Example], folder: Path
) -> None:
    """Raises: ConfigError when the model cannot read the task's first prompts."""
    size = min(SOME, task.train_size or SOME)
    examples = [*map(task.train, range(size)), *held_out[:SOME]]
    unknown = dict.fromkeys(c for e in examples for c in loaded.tokenizer.unknown(e.messages))
    if unknown:
        raise ConfigError(
            f"The model in {folder} has no token for {''.join(unknown)!r}, which prompts of "
            f"{task.name!r} contain. Name another model with --model; the embedded one reads the "
            "tasks steps, sums and sorting."
        )


def _decoder(config: RunConfig, policy: Policy, plan: MemoryPlan) -> Decoder:
    rollout = config.rollout
    stops = make_stops(policy.tokenizer, loops=rollout.stop_loops, text=rollout.stop_text)
    return Decoder(policy, rollout.temperature, plan.decode_rows, stops=stops)


def _rescore(updater: Updater, plan: MemoryPlan) -> Rescore:
    def rescore(groups: Sequence[Group]) -> list[list[np.ndarray]]:
        return group_logprobs(
            updater.policy,
            groups,
            shared=bool(updater.shared),
            micro_rows=plan.micro_rows,
            head_chunk=plan.head_chunk,
            temperature=updater.temperature,
        )

    return rescore


def _plan(config: RunConfig, loaded: LoadedModel, folder: Path) -> MemoryPlan:
    if config.memory.threads:
        backend.set_threads(config.memory.threads)
    machine = backend.describe()
    return make_plan(
        config,
        vocabulary=read_shape(folder).vocabulary,
        dense_bytes=dense_bytes(loaded.model),
        on_cpu=machine.device == "cpu",
        threads=machine.threads,
    )


def _policy(config: RunConfig, loaded: LoadedModel, plan: MemoryPlan) -> Policy:
    return make_policy(
        loaded,
        rank=config.lora.rank,
        scale=config.lora.scale,
        seed=config.run.seed,
        for_cpu=backend.describe().device == "cpu",
        dense=plan.dequantise,
    )


def _open_folder(config: RunConfig, overwrite: bool) -> RunFolder:
    wish = config.run.out
    out = Path(wish) if wish else default_run_path(Path("runs"), config.task.name)
    versions = package_versions(PACKAGES)
    machine = backend.describe()
    return open_run(
        out,
        overwrite=overwrite,
        versions={**versions, "device": machine.device, "blas": machine.blas},
        rollout_log_limit=config.run.rollout_log_limit,
    )
