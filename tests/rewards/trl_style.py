"""Reward functions as people write them for TRL, against chat data; run unchanged by a worker."""

import asyncio
import re

client = None


def unique_characters(completions, **kwargs):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def token_count(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def echoes_prompt(prompts, completions, **kwargs):
    questions = [messages[-1]["content"] for messages in prompts]
    replies = [completion[0]["content"] for completion in completions]
    return [float(question in reply) for question, reply in zip(questions, replies)]  # noqa: B905


def matches_column(completions, ground_truth, **kwargs):
    found = [re.search(r"\d+", completion[0]["content"]) for completion in completions]
    pairs = zip(found, ground_truth, strict=True)
    return [1.0 if match and match[0] == gold else 0.0 for match, gold in pairs]


def only_for_math(prompts, completions, task, **kwargs):
    return [1.0 if name == "math" else None for name in task]


async def waits(completions, **kwargs):
    """Keeps something that belongs to its event loop, as an HTTP client does."""
    global client
    if client is None:
        client = asyncio.Event()
        asyncio.get_running_loop().call_soon(client.set)
    await client.wait()
    await asyncio.gather(*(asyncio.sleep(0) for _ in completions))
    return [0.5] * len(completions)


async def raises_later(completions, **kwargs):
    await asyncio.sleep(0)
    raise RuntimeError("no connection")


def curriculum(completions, trainer_state, **kwargs):
    share = trainer_state.global_step / max(trainer_state.max_steps, 1)
    return [share + (trainer_state.epoch or 0)] * len(completions)


def logs(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    rewards = [float(text == gold) for text, gold in zip(texts, ground_truth, strict=True)]
    if log_extra:
        log_extra("gold", list(ground_truth))
        log_extra("found", [text or "[none]" for text in texts])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


def logs_by_keywords(completions, **kwargs):
    for i, _ in enumerate(completions):
        kwargs["log_extra"](column="place", values=[i])
    kwargs["log_metric"](name="accuracy", value=1)
    return [0.0] * len(completions)


def logs_oddly(completions, log_extra, log_metric, score):
    log_metric("broken", float("nan"))
    log_metric("broken", "text")
    log_metric("exact", 10**400)
    log_metric("fine", 2)
    log_extra("short", [1])
    log_extra("strange", [{1}, float("inf")])
    log_extra("nested", [{"a": float("nan")}, b"bytes"])
    return score


def logs_then_raises(completions, log_metric):
    log_metric("lost", 1.0)
    raise ValueError("after logging")


def numpy_logs(completions, log_extra, log_metric):
    import numpy as np

    log_metric("numpy", np.float32(0.5))
    log_extra("numpy", np.arange(len(completions)))
    return np.zeros(len(completions))


def plain_length(prompts, completions, **kwargs):
    """For data whose prompts are text."""
    return [float(len(prompt + completion)) for prompt, completion in zip(prompts, completions)]  # noqa: B905


def names_nothing_big(prompts):
    return [0.0] * len(prompts)


made = 0


def make(offset=0, *, pattern=""):
    global made
    made += 1

    def reward(completions, **kwargs):
        return [offset + len(pattern) + made / 100 for _ in completions]

    return reward


def make_nothing():
    return 3


def make_badly(size):
    raise ValueError(f"size is {size}")
