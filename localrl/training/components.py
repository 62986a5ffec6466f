"""The components of a run: task, reward scorer, policy, sampler, updater."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from localrl import backend
from localrl.agents.agents import Agents
from localrl.config import RunConfig
from localrl.distributed.collective import ALONE, Ranks
from localrl.engines.choose import choose_engine
from localrl.engines.floats import TRIED, Prompts
from localrl.learning.gradient import GradientPass
from localrl.learning.tracker import Tracker
from localrl.learning.update import Updater
from localrl.memory.plan import PlanRequest
from localrl.policy.model import Policy
from localrl.policy.scoring import group_logprobs
from localrl.policy.tokenizer import Tokenizer
from localrl.processes.heartbeat import Heartbeat
from localrl.processes.worker import Worker
from localrl.records import Example, Group, MemoryPlan, Work
from localrl.rewards.code import check_code_rewards
from localrl.rewards.scoring import Scorer
from localrl.rollouts.decided import Decide, Decisions
from localrl.rollouts.decode import Decoder
from localrl.rollouts.stops import make_stops
from localrl.tasks.base import Task
from localrl.tasks.environments import Environments
from localrl.training.calibrate import calibrate_plan
from localrl.training.demonstrations import Demonstrations, check_room
from localrl.training.given import NOTHING, Given
from localrl.training.memory_plan import (
    make_plan,
    shape_of,
    with_engine,
    worth_measuring,
)
from localrl.training.opened_task import open_and_check
from localrl.training.resolved import ResolvedConfig, load, local_plan_request, open_policy
from localrl.training.sampler import Rescore, Sampler
from localrl.training.supervised import open_supervised
from localrl.training.validate import check_minibatches

ROUNDING = 0.01
"""Change of a completion's mean log-probability by 16-bit rounding alone: 0.05 nats per token in
bfloat16, over 25 tokens."""


@dataclass(eq=False)
class Components:
    """The components of a run; a `Session` adds a run folder."""

    config: RunConfig
    model_folder: Path
    task: Task
    policy: Policy
    plan: MemoryPlan
    request: PlanRequest
    """The request that the plan was made from."""
    may_checkpoint: bool
    scorer: Scorer
    decoder: Decoder
    sampler: Sampler
    updater: Updater
    tracker: Tracker
    held_out: list[Example]
    judges: Sequence[str]
    """A line on each model that the rewards ask."""

    @property
    def demonstrations(self) -> Demonstrations | None:
        """The completions that a supervised run is given; None if a run samples its own."""
        return self.sampler.demonstrations

    @property
    def evaluates(self) -> bool:
        """True if there is anything to evaluate on: prompts, or worked examples."""
        given = self.demonstrations
        return bool(self.held_out or (given is not None and given.held_out))

    @property
    def least_rows(self) -> int:
        """Number of rows that must be decoded at once: those of one tree."""
        shape = self.sampler.shape
        return shape.leaves if shape.leaves > shape.roots else 1

    def use(self, plan: MemoryPlan) -> None:
        """Switch to another plan."""
        self.plan = self.sampler.plan = plan
        self.sampler.shape = shape_of(self.config, plan)
        self.decoder.rows, self.decoder.prefill_rows = plan.decode_rows, plan.prefill_rows


@contextmanager
def open_components(
    resolved: ResolvedConfig,
    *,
    warn: Callable[[str], None],
    heartbeat: Heartbeat,
    plan: MemoryPlan | None = None,
    trains: bool = True,
    whole: bool = False,
    given: Given = NOTHING,
    ranks: Ranks = ALONE,
) -> Iterator[Components]:
    """Open the task, its rewards and the model. plan: the plan of a resumed run.

    trains: False to evaluate only. whole: True to evaluate on all rows of the task's data. given:
    rows and rewards that the settings cannot name.

    Raises: ConfigError or DataError for what cannot work; MemoryBudgetError if memory is too small,
    before weights are loaded.
    """
    beat, limits = heartbeat.beat, resolved.config.task
    with (
        ExitStack() as stack,
        Worker(
            time_limit_s=limits.reward_timeout_s,
            memory_limit_bytes=limits.reward_memory_mb * 2**20,
        ) as worker,
    ):
        if trains and resolved.config.supervised:
            opened = open_supervised(resolved, worker, warn, beat, given=given)
        else:
            opened = open_and_check(
                resolved,
                worker,
                warn,
                beat,
                given=given,
                trains=trains,
                whole=whole,
                try_rewards=trains and plan is None,
            )
        config, task, environments = opened.config, opened.task, opened.environments
        if trains:
            check_minibatches(config)
        resolved, tokenizer = replace(resolved, config=config), opened.tokenizer
        turns = environments is not None
        request = local_plan_request(resolved, prompts=opened.prompts, trains=trains, turns=turns)
        planned, plan = plan, plan or make_plan(config, request)
        if opened.demonstrations is not None:
            check_room(opened.demonstrations, plan)
        beat(Work("loading the model"))
        loaded = load(resolved, tokenizer)
        beat(Work("checking that the model computes rightly"))
        policy = open_policy(resolved, loaded, plan, _trial_prompts(config, task, tokenizer))
        policy = choose_engine(policy, config.model.engine, warn, selfcheck=config.model.selfcheck)
        fixed = planned is not None or bool(config.memory.pin)
        request, plan = with_engine(request, plan, engine=policy.engine.name, fixed=fixed)
        _connect(environments, policy.tokenizer, stack)
        learning = config.learning
        updates = config.run.steps * learning.minibatches * learning.updates_per_step
        updater = Updater(
            policy,
            learning,
            config.rollout.temperature,
            warn,
            beat,
            updates,
            supervised=opened.demonstrations is not None,
        )
        if trains:
            _check_rounding(updater, warn)
        may_checkpoint = trains and _may_recompute(policy, warn)
        request = replace(request, may_checkpoint=may_checkpoint)
        if config.memory.recalibrate and request.counted(plan):
            warn("memory.recalibrate has no effect: this engine's memory is counted, not measured")
        if trains and planned is None and worth_measuring(config, request, plan):
            beat(Work("measuring memory"))
            plan = calibrate_plan(
                updater.gradient, request, plan, warn, anew=config.memory.recalibrate
            )
        # Only now, since each machine measures its own memory.
        updater.gradient.ranks = ranks
        decoder = _decoder(config, policy, plan, heartbeat, opened.decide)
        tracker = Tracker()
        yield Components(
            config=config,
            model_folder=resolved.model_folder,
            task=task,
            policy=policy,
            plan=plan,
            request=request,
            may_checkpoint=may_checkpoint,
            scorer=opened.scorer,
            decoder=decoder,
            sampler=Sampler(
                config,
                task,
                plan,
                decoder,
                tracker,
                shape_of(config, plan),
                opened.scorer.score,
                _rescore(updater.gradient),
                environments,
                ranks,
                opened.demonstrations,
            ),
            updater=updater,
            tracker=tracker,
            held_out=opened.held_out,
            judges=opened.judges,
        )


def _connect(
    environments: Environments | Agents | None, tokenizer: Tokenizer, stack: ExitStack
) -> None:
    """Connect what answers the model's turns, or asks for them, until the stack is closed."""
    if environments is not None:
        environments.connect(tokenizer)
    if isinstance(environments, Agents):
        stack.callback(environments.close)


def _trial_prompts(config: RunConfig, task: Task, tokenizer: Tokenizer) -> Prompts:
    """Encode the task's first prompts if float16 may be tried."""
    dtype = config.model.dtype
    if dtype in ("bf16", "fp32") or (dtype == "auto" and backend.describe().device == "cpu"):
        return ()
    size = min(TRIED, task.train_size or TRIED)
    return tokenizer.encode_prompts([task.train(i) for i in range(size)])


def _may_recompute(policy: Policy, warn: Callable[[str], None]) -> bool:
    """Check whether gradients can be recomputed block by block, and record the check."""
    check = policy.engine.check_recompute()
    policy.checks.append(check)
    if np.isnan(check.value):
        warn("The gradient of a plain sentence is not a number, so blocks are never recomputed.")
    return check.accepted


def check_sandbox(config: RunConfig, task: Task, warn: Callable[[str], None]) -> str | None:
    """Return the sandbox that code in answers will run in; None if no built-in reward runs any.

    A user's reward may run code too, so the unsafe flag is always reported.

    Raises: ConfigError if there is no sandbox.
    """
    ours = any(spec.target.startswith("localrl.rewards.code:") for spec in task.rewards)
    if not ours and not config.task.unsafe_code:
        return None
    found = check_code_rewards()
    if found.startswith("UNSAFE"):
        warn(found)
    return found


def _decoder(
    config: RunConfig,
    policy: Policy,
    plan: MemoryPlan,
    heartbeat: Heartbeat,
    decide: Decide | None,
) -> Decoder:
    rollout = config.rollout
    stops = make_stops(policy.tokenizer, loops=rollout.stop_loops, texts=rollout.stop_text)
    return Decoder(
        policy,
        rollout.temperature,
        plan.decode_rows,
        stops=stops,
        decisions=None if decide is None else Decisions(decide, policy.tokenizer),
        beat=heartbeat.beat,
        prefill_rows=plan.prefill_rows,
    )


def _check_rounding(updater: Updater, warn: Callable[[str], None]) -> None:
    """Warn of a clip range that 16-bit rounding alone leaves once the adapters have changed."""
    objective, learning = updater.objective, updater.config
    highest = max(objective.clip_low, objective.clip_high)
    if objective.ratio != "sequence" or learning.updates_per_step == 1 or highest >= ROUNDING:
        return
    if updater.policy.sixteen_bit:
        warn(
            f"learning.objective={learning.objective} clips completions at {highest:g} from 1, and "
            "in 16 bits any change of the adapters moves them by up to 0.01 through rounding: a "
            "step's updates after the first leave out completions by chance. Set "
            f"learning.updates_per_step (now {learning.updates_per_step}) to 1 or model.dtype=fp32."
        )


def _rescore(gradient: GradientPass) -> Rescore:
    def rescore(groups: Sequence[Group], plan: MemoryPlan) -> list[list[np.ndarray]]:
        return group_logprobs(
            gradient.policy,
            groups,
            shared=bool(gradient.shared),
            micro_rows=plan.micro_rows,
            head_chunk=plan.head_chunk,
            temperature=gradient.temperature,
        )

    return rescore
