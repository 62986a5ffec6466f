"""A user's reward file for TRL and data whose prompts are text.

The shapes are those of the numbered examples under "Using a custom reward function" in TRL's page
on GRPO; nothing here knows of localrl.
"""

import asyncio
import re

BOXED = re.compile(r"\\boxed\{(.*?)\}")


# Example 1
def more_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


# Example 1.1
def more_characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


# Example 3
def boxed_truth(completions, ground_truth, **kwargs):
    found = [BOXED.search(completion) for completion in completions]
    answers = [match.group(1) if match else "" for match in found]
    return [1.0 if a == truth else 0.0 for a, truth in zip(answers, ground_truth, strict=True)]


# Example 4: each function is for one kind of problem
def for_math(prompts, completions, task, **kwargs):
    rewards = []
    for prompt, completion, kind in zip(prompts, completions, task, strict=True):
        if kind == "math":
            rewards.append(1.0 if prompt.endswith("?") and "4" in completion else -1.0)
        else:
            rewards.append(None)
    return rewards


def for_code(prompts, completions, task, **kwargs):
    return [
        (1.0 if "return" in completion else -1.0) if kind == "coding" else None
        for completion, kind in zip(completions, task, strict=True)
    ]


# Example 5
async def not_empty(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 if completion else 0.0 for completion in completions]


async def third_of_length(completions, **kwargs):
    await asyncio.sleep(0)
    return [len(completion) / 3 for completion in completions]


# Example 6
def logged(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    found = [BOXED.search(completion) for completion in completions]
    answers = [match.group(1) if match else None for match in found]
    rewards = [1.0 if a == truth else 0.0 for a, truth in zip(answers, ground_truth, strict=True)]
    if log_extra:
        log_extra("golden_answer", list(ground_truth))
        log_extra("extracted_answer", [answer or "[none]" for answer in answers])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


# `trainer_state`, as the page describes it: a reward that changes during the run
def curriculum(completions, trainer_state, **kwargs):
    share = trainer_state.global_step / trainer_state.max_steps
    return [share + len(completion) / 100 for completion in completions]


def where_it_stands(completions, trainer_state, log_metric, **kwargs):
    log_metric("seen_step", trainer_state.global_step)
    log_metric("seen_max_steps", trainer_state.max_steps)
    log_metric("seen_epoch", trainer_state.epoch)
    return [0.0] * len(completions)
