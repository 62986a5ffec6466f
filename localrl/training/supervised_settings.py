"""The settings of a run that learns from given completions, and those without effect there."""

from __future__ import annotations

from collections.abc import Iterator

from localrl.config import RunConfig, keys
from localrl.errors import ConfigError
from localrl.tasks.loading import NO_TASK

USED = {
    "rollout": (
        "prompts_per_step", "max_prompt_tokens", "max_completion_tokens", "max_turns",
        "temperature", "stop_text",
    ),
    "learning": (
        "lr", "warmup_steps", "lr_schedule", "kl_coef", "kl_estimator", "max_grad_norm",
        "minibatches", "updates_per_step",
    ),
}  # fmt: skip
"""Settings of these sections that mean something where completions are given."""
WITHOUT_TASK = (
    "task.filter_overlong_prompts",
    "task.rewards",
    "task.reward_weights",
    "task.environment",
    "task.agent",
)
"""Settings that mean nothing where no task is measured besides: no worked example is left out."""
FIXED = {"rollout.strategy": "flat", "rollout.group_size": 1}
"""Settings with a value of their own there: one completion for each prompt."""


def as_supervised(config: RunConfig) -> RunConfig:
    """Return the settings of a run that learns from given completions: one for each prompt.

    Raises: ConfigError if a setting differs from its default and has no effect there.
    """
    defaults = RunConfig()
    for key in _unused(config):
        value, default = config.value(key), defaults.value(key)
        if value not in (default, FIXED.get(key, default)):
            section = key.partition(".")[0]
            others = USED.get(section)
            told = f"; of {section} these have one: {', '.join(others)}" if others else ""
            raise ConfigError(
                f"{key} has no effect in a supervised run, whose completions are given, and is "
                f"{value!r}. Leave it out{told}."
            )
    for key, value in FIXED.items():
        config = config.replace(key, value)
    return config


def _unused(config: RunConfig) -> Iterator[str]:
    """Yield the settings that mean nothing in this supervised run."""
    for key in keys():
        section, _, name = key.partition(".")
        if section in USED and name not in USED[section]:
            yield key
    yield "task.decided"
    if config.task.name == NO_TASK:
        yield from WITHOUT_TASK
