"""Rejects settings that cannot work together, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

from localrl.config import RunConfig
from localrl.errors import ConfigError, DataError
from localrl.learning.objectives import make_objective
from localrl.records import Example
from localrl.rollouts.groups import Shape
from localrl.tasks.base import Task


def reused_roots(config: RunConfig, shape: Shape) -> int:
    """Return how many roots of a prompt may reuse earlier completions; at least one stays fresh.

    Otherwise a group that teaches nothing would repeat unchanged forever.
    """
    return min(round(config.rollout.reuse * shape.roots), shape.roots - 1)


def fit_prompts(config: RunConfig, task: Task, warn: Callable[[str], None]) -> RunConfig:
    """Return the settings with no more prompts per step than the task has, and warn of a change."""
    wish, there = config.rollout.prompts_per_step, task.train_size
    if not 0 < there < wish:
        return config
    warn(
        f"the task has {there} training prompts, fewer than rollout.prompts_per_step={wish}: each "
        f"step takes all {there}"
    )
    return config.replace("rollout.prompts_per_step", there)


def check(config: RunConfig, shape: Shape, task: Task) -> None:
    """Reject settings that cannot work together.

    Raises: ConfigError.
    """
    rollout = config.rollout
    if rollout.completions == 1 and not config.tracker_weight:
        raise ConfigError(
            "learning.kappa is 0 and rollout.group_size is 1: a completion would have nothing to "
            "be compared with. Leave kappa out, or raise the group size."
        )
    if config.task.agent:
        _check_agent(config, shape)
    if shape.leaves > shape.roots:
        _check_trees(config, shape)
    _check_weights(config, shape)
    _check_reuse(config, shape)
    if task.environment or config.task.environment or config.task.tools or config.task.agent:
        _check_turns(config)


def check_minibatches(config: RunConfig) -> None:
    """Reject more mini-batches than a step has prompts, or examples.

    Raises: ConfigError.
    """
    count, prompts = config.learning.minibatches, config.rollout.prompts_per_step
    if count > prompts:
        raise ConfigError(
            f"learning.minibatches is {count}, but a step has {prompts} of the prompts of which "
            "each needs one (rollout.prompts_per_step). Lower it."
        )


def _check_turns(config: RunConfig) -> None:
    if config.rollout.reuse:
        raise ConfigError(
            f"rollout.reuse is {config.rollout.reuse:g}, but a completion that talked to an "
            "environment, or an agent's, cannot be restarted from its middle. Set it to 0."
        )
    if config.task.decided:
        raise ConfigError(
            f"task.decided is {config.task.decided}, but what ends a completion that talks to an "
            "environment is the environment, and an agent's is the agent. Leave it out."
        )


def _check_agent(config: RunConfig, shape: Shape) -> None:
    rollout = config.rollout
    if shape.leaves > shape.roots:
        raise ConfigError(
            f"rollout.strategy is {rollout.strategy}, but an agent cannot be copied where a "
            "completion forks. Set it to flat or adaptive."
        )


def check_prompt(example: Example, tokens: int, most: int) -> None:
    """Reject a prompt that is too long: nothing is cut silently.

    Raises: DataError if it is empty, or longer than `most`, which is rollout.max_prompt_tokens.
    """
    if not 0 < tokens <= most:
        raise DataError(
            f"The prompt of {example.id} has {tokens} tokens; 1 to {most} are allowed. Raise "
            "rollout.max_prompt_tokens."
        )


def _check_trees(config: RunConfig, shape: Shape) -> None:
    rows = config.memory.decode_rows
    if 0 < rows < shape.leaves:
        raise ConfigError(
            f"memory.decode_rows is {rows}, but a tree may have {shape.leaves} leaves at "
            "once. Raise it, or lower rollout.group_size."
        )
    if make_objective(config.learning).flat_only:
        raise ConfigError(
            f"learning.objective is {config.learning.objective}, which divides by the length of "
            "the one completion a token belongs to; in a tree completions share tokens. Choose "
            "another objective, or rollout.strategy=flat."
        )


def _check_weights(config: RunConfig, shape: Shape) -> None:
    objective, name = make_objective(config.learning), config.learning.objective
    if objective.prompt_weight != "none" and (shape.rounds > 1 or config.rollout.completions == 1):
        raise ConfigError(
            f"learning.objective={name} weighs a prompt by its rewards "
            f"({objective.prompt_weight}). A single completion has no such weight, and with rounds "
            "it would depend on later rounds. Set learning.prompt_weight=none, or "
            "rollout.strategy=flat with a larger group."
        )
    if objective.length in ("group", "step") and shape.rounds > 1:
        raise ConfigError(
            f"learning.objective={name} divides by the number of sampled tokens; with rounds, that "
            "number depends on the rewards. Choose clipped or rloo, or rollout.strategy=flat."
        )


def _check_reuse(config: RunConfig, shape: Shape) -> None:
    rollout = config.rollout
    if rollout.reuse and not reused_roots(config, shape):
        raise ConfigError(
            f"rollout.reuse is {rollout.reuse:g}, but of {shape.roots} completions (of the first "
            "round, or roots of a tree) at least one stays fresh, and fewer than one would be "
            "reused. Raise it, or the group size."
        )
