"""The task of a run, opened and checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from localrl.agents.agents import Agents, open_agents
from localrl.agents.conversations import AgentLimits
from localrl.config import RunConfig
from localrl.errors import ConfigError
from localrl.memory.plan import PromptLength
from localrl.policy.roundtrip import check_tokenizer
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.processes.worker import Worker
from localrl.records import Example, Group, Work
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.in_process import InProcess
from localrl.rewards.scoring import Scorer
from localrl.rollouts.decided import Decide
from localrl.tasks.base import Task
from localrl.tasks.builtin import BuiltinTask
from localrl.tasks.environments import Environments
from localrl.tasks.files import FileTask
from localrl.tasks.loading import is_data, open_task, with_environments
from localrl.training.demonstrations import Demonstrations
from localrl.training.given import Given
from localrl.training.prompt_lengths import read_prompts
from localrl.training.resolved import ResolvedConfig
from localrl.training.reward_checks import check_columns, check_rewards, find_judges
from localrl.training.validate import check, fit_prompts


@dataclass(frozen=True, eq=False)
class OpenedTask:
    """A task whose every prompt was read, with its rewards and the model's tokenizer."""

    config: RunConfig
    """The settings, with no more prompts than the task has."""
    task: Task
    environments: Environments | Agents | None
    scorer: Scorer
    decide: Decide | None
    """Tells which completions are decided; None if nothing does."""
    tokenizer: Tokenizer
    prompts: PromptLength
    judges: tuple[str, ...]
    """A line on each model that the rewards ask."""
    demonstrations: Demonstrations | None = None
    """Completions that are given; None if they are sampled."""

    @property
    def held_out(self) -> list[Example]:
        """The prompts of evaluations."""
        return self.task.evaluation(self.config.task.held_out)


def open_and_check(
    resolved: ResolvedConfig,
    worker: Worker,
    warn: Callable[[str], None],
    beat: Callable[[Work], None],
    *,
    given: Given,
    trains: bool,
    whole: bool,
    try_rewards: bool,
) -> OpenedTask:
    """Open the task, check its columns and rewards, and read all prompts.

    try_rewards: try the rewards on gold answers. The others: see `components.open_components`.

    Raises: ConfigError or DataError for what cannot work.
    """
    config = resolved.config
    beat(Work("opening the task"))
    task = open_task(config.task, resolved.rewards, worker, whole=whole, rows=given.rows)
    if trains:
        config = fit_prompts(config, task, warn)
        check(config, resolved.shape, task)
    elif whole and config.task.eval_prompts is None:
        config = config.replace("task.eval_prompts", task.train_size)
    task, environments = _with_turns(config, task, worker, warn, beat)
    outcomes = environments.outcomes if isinstance(environments, Agents) else {}
    judge = partial(Scorer, task.rewards, InProcess(worker, given.functions, outcomes), warn)
    scorer = judge(cut_reward=config.task.cut_reward, beat=beat)
    held_out = task.evaluation(config.task.held_out)
    check_columns(task, held_out, scorer)
    decide = None
    if trains and config.task.decided:
        decider = Scorer(parse_rewards([config.task.decided]), worker, warn)
        check_columns(task, held_out, decider)
        decide = partial(_decided, decider)
    judges = find_judges(task, worker)
    tokenizer = checked_tokenizer(resolved, warn)
    scorer.render = lambda ids: "".join(tokenizer.pieces(ids))
    if try_rewards and environments is None:
        beat(Work("trying the rewards on gold answers"))
        own = given.rows is not None or is_data(config.task.name)
        # By another scorer, so that the run's counts stay at zero.
        check_rewards(task, judge(), tokenizer, warn, gold=own)
    reading = partial(beat, Work("reading the task's prompts"))
    reading()
    task, prompts = read_prompts(
        config, task, tokenizer, warn, trains=trains, environments=environments, beat=reading
    )
    if trains:  # there are fewer if overlong ones were left out
        config = fit_prompts(config, task, warn)
    return OpenedTask(
        config=config,
        task=task,
        environments=environments,
        scorer=scorer,
        decide=decide,
        tokenizer=tokenizer,
        prompts=prompts,
        judges=judges,
    )


def _decided(decider: Scorer, groups: Sequence[Group]) -> list[bool]:
    """Ask the function of `task.decided`; where it fails, a completion is not decided."""
    decided = [bool(scored.rewards[0]) for scored in decider.score(groups)]
    decider.take_logs()  # kept for nobody
    return decided


def _with_turns(
    config: RunConfig,
    task: BuiltinTask | FileTask,
    worker: Worker,
    warn: Callable[[str], None],
    beat: Callable[[Work], None],
) -> tuple[BuiltinTask | FileTask, Environments | Agents | None]:
    """Open what completions of several turns come from; returns the task with its rewards too.

    Raises: ConfigError or DataError if it cannot be used, or there is more than one.
    """
    target = config.task.agent
    if target is None:
        return with_environments(config.task, task, worker, warn)
    if config.task.environment or config.task.tools:
        raise ConfigError(
            "task.agent and an environment or tools are set; an agent brings its own. Keep one."
        )
    rollout = config.rollout
    limits = AgentLimits(rollout.max_turns, rollout.max_prompt_tokens, config.task.agent_timeout_s)
    agents = open_agents(target, worker, limits, warn=warn, beat=beat)
    return replace(task, rewards=(*task.rewards, agents.reward)), agents


def checked_tokenizer(resolved: ResolvedConfig, warn: Callable[[str], None]) -> Tokenizer:
    """Load the tokenizer; warn of what it does not give back, or refuse it if checks are strict."""
    settings = resolved.config.model
    tokenizer = load_tokenizer(resolved.model_folder, settings)
    strict = settings.selfcheck == "strict"
    for fault in check_tokenizer(tokenizer, resolved.model_folder, strict=strict):
        warn(fault)
    return tokenizer
