"""Measures the prompt lengths of a task, which the memory plan needs before weights are loaded.

Everything here depends on settings, task and model alone, because the group size may depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from localrl.config import RunConfig
from localrl.errors import LocalRLError
from localrl.memory.plan import PromptLength
from localrl.policy.loading import find_model
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.processes.worker import Worker
from localrl.records import Example
from localrl.rewards.catalog import parse_rewards
from localrl.tasks.base import Task
from localrl.tasks.loading import open_task
from localrl.tasks.order import take
from localrl.training.validate import check_prompt

MOST = 1024
"""Largest number of training prompts measured: of a larger set, only the longest."""
ENDLESS = 256
"""Number of prompts that represent an endless task: the first ones that the run will use."""
MARGIN = 8
"""Fraction 1/MARGIN added to the planned length when not all prompts are known."""


def measure(
    config: RunConfig,
    task: Task,
    held_out: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    trains: bool = True,
) -> PromptLength:
    """Return the length to plan for: the longest prompt's, plus a margin if some are unseen.

    Raises: DataError for a prompt longer than rollout.max_prompt_tokens, or if the model's chat
    template refuses one.
    """
    most = config.rollout.max_prompt_tokens
    if config.task.environment or config.task.tools or task.environment:
        return _allowed(config, "an environment may add to them")
    training, all_of_them = _training(config, task) if trains else ([], True)
    examples = [*training, *held_out]
    if not examples:
        return _allowed(config, "there are none")
    lengths = [len(ids) for ids in tokenizer.encode_all([e.messages for e in examples])]
    for example, length in zip(examples, lengths, strict=True):
        check_prompt(example, length, most)
    longest = max(lengths)
    if all_of_them:
        return PromptLength(longest, f"measured on all {len(examples)} of them")
    planned = min(most, longest + -(-longest // MARGIN))
    basis = f"measured on {len(examples)} of them, the longest of which has {longest}"
    return PromptLength(planned, basis)


def find(config: RunConfig) -> PromptLength:
    """Return the same from the settings alone, if the model's folder and the task are local.

    Raises: the same errors as `measure`.
    """
    limits = config.task
    try:
        folder = find_model(config.model.path)
        tokenizer = load_tokenizer(folder, thinking=config.model.thinking)
    except LocalRLError as error:
        return _allowed(config, str(error))
    with Worker(
        time_limit_s=limits.reward_timeout_s,
        memory_limit_bytes=limits.reward_memory_mb * 2**20,
    ) as worker:
        try:
            specs = parse_rewards(config.task.rewards or ["accuracy"])  # data need at least one
            task = open_task(config.task, specs, worker)
            held_out = task.evaluation(config.task.held_out)
        except LocalRLError as error:
            return _allowed(config, str(error))
        return measure(config, task, held_out, tokenizer)


def _allowed(config: RunConfig, why: str) -> PromptLength:
    """Return the longest allowed length, for when nothing can be measured."""
    reason = re.split(r"[.:;](?:\s|$)", why)[0]
    return PromptLength(config.rollout.max_prompt_tokens, f"rollout.max_prompt_tokens ({reason})")


def _training(config: RunConfig, task: Task) -> tuple[list[Example], bool]:
    """Return the training examples to measure, and True if these are all of them."""
    if not task.train_size:
        return take(task, 0, ENDLESS, config.run.seed), False
    examples = [task.train(i) for i in range(task.train_size)]
    if len(examples) <= MOST:
        return examples, True
    return sorted(examples, key=_characters, reverse=True)[:MOST], False


def _characters(example: Example) -> int:
    return sum(len(str(message.get("content", ""))) for message in example.messages)
