"""Reward functions with TRL's signature, good and hostile; addressed by this file's path."""

import asyncio
import math
import os
import sys
import threading
import time


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def right(completions, answer):
    texts = [completion[0]["content"] for completion in completions]
    return [text == gold for text, gold in zip(texts, answer, strict=True)]


async def right_later(completions, answer):
    await asyncio.sleep(0)
    return right(completions, answer)


def level(level):
    return level


def not_applicable(completions):
    return [None for _ in completions]


def only_first(completions):
    return [3, *(None for _ in completions[1:])]


def numpy_floats(completions):
    import numpy as np

    return np.arange(len(completions), dtype=np.float32)


def everything(**kwargs):
    """Fails unless each argument is what TRL's documentation promises."""
    count = len(kwargs["completions"])
    ours = {"trainer_state", "log_extra", "log_metric", "rendered_prompts"}
    assert set(kwargs) - ours == {"prompts", "completions", "completion_ids", "answer", "level"}, (
        kwargs
    )
    assert kwargs["prompts"] == [[{"role": "user", "content": "sort"}]] * count
    assert kwargs["completions"][0] == [{"role": "assistant", "content": "a"}]
    assert kwargs["completion_ids"][:2] == [[1, 2], [1, 3]]
    assert kwargs["answer"] == ["a"] * count
    assert kwargs["level"] == [4.0] * count
    return [1.0] * count


def prompt_lengths(rendered_prompts):
    return [float(len(text)) for text in rendered_prompts]


def needs_a_column(completions, ground_truth):
    return [1.0] * len(completions)


def raises(completions):
    return 1 / 0


def hangs(completions):
    while True:
        pass


def nan(completions):
    return [math.nan, *[1.0] * (len(completions) - 1)]


def infinite(completions):
    return [math.inf, *[1.0] * (len(completions) - 1)]


def text(completions):
    return ["1.0", *[1.0] * (len(completions) - 1)]


def huge(completions):
    return [10**400, *[1.0] * (len(completions) - 1)]


def too_few(completions):
    return [1.0] * (len(completions) - 1)


def one_number(completions):
    return 1.0


def dies(completions):
    os._exit(0)


def exits(completions):
    sys.exit(0)


def hogs_memory(completions):
    block = bytearray(400 << 20)
    time.sleep(5)
    return [float(len(block))] * len(completions)


def asks(completions):
    return [float(input("reward? "))] * len(completions)


def prints(completions):
    sys.stdout.write("x" * (4 << 20))
    os.write(1, b"\0" * 1000)
    return [1.0] * len(completions)


def leaves_a_thread(completions):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return [1.0] * len(completions)


def fails_at_level(completions, level):
    if level[0] > 0:
        raise ValueError(f"level {level[0]}")
    return [1.0] * len(completions)
