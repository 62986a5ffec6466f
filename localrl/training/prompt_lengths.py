"""Measures the prompt lengths of a task, which the memory plan needs before weights are loaded.

Everything here depends on settings, task and model alone, because the group size may depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from localrl.agents.agents import Agents
from localrl.config import RunConfig
from localrl.errors import DataError, LocalRLError
from localrl.memory.plan import PromptLength
from localrl.policy.loading import find_model
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.processes.worker import Worker
from localrl.records import Example
from localrl.rewards.catalog import parse_rewards
from localrl.tasks.base import Task
from localrl.tasks.environments import Environments
from localrl.tasks.files import FileTask, without
from localrl.tasks.loading import open_task
from localrl.tasks.order import take
from localrl.training.prompt_checks import check_prompts, tell_overlong, warn_of_prompts

ENDLESS = 256
"""Number of prompts that represent an endless task: the first ones that the run will use."""
MARGIN = 8
"""Fraction 1/MARGIN added to the planned length when not all prompts are known."""


def read_prompts(
    config: RunConfig,
    task: Task,
    tokenizer: Tokenizer,
    warn: Callable[[str], None] = lambda line: None,
    *,
    trains: bool = True,
    environments: Environments | Agents | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Task, PromptLength]:
    """Render and count every prompt that a run may draw, so that none ends it later.

    Returns the task, without overlong prompts if the settings leave them out, and the length to
    plan for: the longest prompt's, plus a margin if some are unseen. What environments add to
    prompts is not known. beat: called now and then; it may raise to end the reading.

    Raises: DataError, naming file and line, for prompts that are too long or that the chat template
    refuses; ConfigError for those that the model cannot read.
    """
    if config.task.agent:
        return task, _allowed(config, "an agent makes them")
    training, complete = _training(config, task) if trains else ([], True)
    filters = config.task.filter_overlong_prompts
    count = config.task.held_out
    if filters and isinstance(task, FileTask):
        count = len(task.held_out)  # those left out are replaced by later ones
    examples = [*training, *task.evaluation(count)]
    seen = examples
    if isinstance(environments, Environments):
        seen = [environments.with_tools(example) for example in examples]
    lengths = check_prompts(seen, tokenizer, task.name, beat)
    warn_of_prompts(examples, tokenizer, warn)
    most = config.rollout.max_prompt_tokens
    long = [(e, n) for e, n in zip(examples, lengths, strict=True) if n > most]
    if long and not (filters and isinstance(task, FileTask)):
        raise DataError(tell_overlong(long, len(examples), most))
    if long and isinstance(task, FileTask):
        task = without(task, {example.place for example, _ in long})
        warn(
            f"task.filter_overlong_prompts leaves out {len(long)} of {len(examples)} prompts, "
            f"which have more than {most} tokens (the longest has {max(n for _, n in long)})"
        )
    if environments is not None or config.task.environment or config.task.tools or task.environment:
        return task, _allowed(config, "an environment may add to them")
    return task, _planned(config, [n for n in lengths if n <= most], complete=complete)


def _planned(config: RunConfig, lengths: Sequence[int], *, complete: bool) -> PromptLength:
    if not lengths:
        return _allowed(config, "there are none")
    longest = max(lengths)
    if complete:
        return PromptLength(longest, f"measured on all {len(lengths)} of them")
    planned = min(config.rollout.max_prompt_tokens, longest + -(-longest // MARGIN))
    basis = f"measured on {len(lengths)} of them, the longest of which has {longest}"
    return PromptLength(planned, basis)


def find(config: RunConfig) -> PromptLength:
    """Return the same from the settings alone, if the model's folder and the task are local.

    Raises: the same errors as `read_prompts`.
    """
    limits = config.task
    try:
        folder = find_model(config.model.path)
        tokenizer = load_tokenizer(folder, config.model)
    except LocalRLError as error:
        return _allowed(config, str(error))
    with Worker(
        time_limit_s=limits.reward_timeout_s,
        memory_limit_bytes=limits.reward_memory_mb * 2**20,
    ) as worker:
        try:
            specs = parse_rewards(config.task.rewards or ["accuracy"])  # data need at least one
            task = open_task(config.task, specs, worker)
        except LocalRLError as error:
            return _allowed(config, str(error))
        return read_prompts(config, task, tokenizer)[1]


def _allowed(config: RunConfig, why: str) -> PromptLength:
    """Return the longest allowed length, for when nothing can be measured."""
    reason = re.split(r"[.:;](?:\s|$)", why)[0]
    return PromptLength(config.rollout.max_prompt_tokens, f"rollout.max_prompt_tokens ({reason})")


def _training(config: RunConfig, task: Task) -> tuple[list[Example], bool]:
    """Return the training examples to measure, and True if these are all of them."""
    if not task.train_size:
        return take(task, 0, ENDLESS, config.run.seed), False
    return [task.train(i) for i in range(task.train_size)], True
