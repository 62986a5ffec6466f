"""Rewards for form: thinking tags, patterns, length, repetition. Plain Python.

Functions whose names begin with `get_` make a reward function from settings. Names, arguments and
numbers are TRL's where it has them. Lengths are in completion tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from localrl.rewards.accuracy import accuracy_reward
from localrl.rewards.answers import Completion, text_of
from localrl.rewards.extract import THOUGHT_END

THOUGHT_START = "<think>"

Ids = Sequence[Sequence[int]]
Reward = Callable[..., list[float | None]]


def think_format_reward(
    completions: Sequence[Completion],
    rendered_prompts: Sequence[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 if a completion begins with <think>, has no second one, and has a </think>; else 0.0.

    rendered_prompts: prompts as the model saw them. After one that ends with <think>, as some chat
        templates do, the completion must not write it again.
    """
    begun = [_begins_thought(prompt) for prompt in rendered_prompts or [""] * len(completions)]
    pairs = zip(completions, begun, strict=True)
    return [float(_is_thought(text_of(completion), inside)) for completion, inside in pairs]


def _begins_thought(prompt: str) -> bool:
    return prompt.rstrip().endswith(THOUGHT_START)


def _is_thought(text: str, inside: bool) -> bool:
    rest = text if inside else text.removeprefix(THOUGHT_START)
    begins = inside or rest != text
    return begins and THOUGHT_START not in rest and THOUGHT_END in rest


def get_regex_reward(pattern: str, search: bool = False) -> Reward:
    """Make a reward that is 1.0 for completions that match a regular expression, else 0.0.

    pattern: in the syntax of Python's `re`; a dot matches line ends too.
    search: True if a match anywhere counts; otherwise the whole text, stripped, must match.

    Raises:
        ValueError: the pattern cannot be compiled.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    match = compiled.search if search else compiled.fullmatch

    def regex_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return [float(match(text_of(c).strip()) is not None) for c in completions]

    return regex_reward


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Reward:
    """Make a penalty: 0 up to max_completion_len - soft_punish_cache tokens, -1 above the maximum.

    Between the two it falls linearly and reaches -1 at the maximum. (DAPO, arXiv:2503.14476,
    equation 13.) It only punishes: shorter completions are not favoured.

    soft_punish_cache: length of the ramp in tokens; 0 for none.

    Raises:
        ValueError: soft_punish_cache is not between 0 and max_completion_len.
    """
    _check(0 <= soft_punish_cache <= max_completion_len, soft_punish_cache=soft_punish_cache)
    free = max_completion_len - soft_punish_cache

    def soft_overlong_punishment_reward(completion_ids: Ids, **columns: Any) -> list[float | None]:
        return [_overlong(len(ids), free, max_completion_len) for ids in completion_ids]

    return soft_overlong_punishment_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Reward:
    """Make a penalty: max_penalty times the share of token n-grams that repeat others.

    The share is 1 - different / all, so no repetition gives 0.0; so does a completion
    shorter than ngram_size. (arXiv:2502.03373, appendix C.2.)

    Raises:
        ValueError: ngram_size is not positive, or max_penalty is.
    """
    _check(ngram_size > 0, ngram_size=ngram_size)
    _check(max_penalty <= 0, max_penalty=max_penalty)

    def repetition_penalty_reward(completion_ids: Ids, **columns: Any) -> list[float | None]:
        shares = [_repeated(ids, ngram_size) for ids in completion_ids]
        return [share * max_penalty if share else 0.0 for share in shares]

    return repetition_penalty_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Reward:
    """Make an accuracy reward that favours short right answers and punishes short wrong ones more.

    A right answer gets max_value_correct at length 0 and min_value_correct from max_len tokens on;
    a wrong one min_value_wrong and max_value_wrong; between them half a cosine. None where
    `accuracy_reward` gives None. (arXiv:2502.03373, appendix C.1.)

    Raises:
        ValueError: max_len is not positive.
    """
    _check(max_len > 0, max_len=max_len)
    ends = {1.0: (max_value_correct, min_value_correct), 0.0: (min_value_wrong, max_value_wrong)}

    def cosine_scaled_reward(
        completions: Sequence[Completion],
        solution: Sequence[Any] | None = None,
        completion_ids: Ids = (),
        answer: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        right = accuracy_reward(completions, solution, answer)
        pairs = zip(right, completion_ids, strict=True)
        return [
            None if correct is None else _cosine(min(len(ids) / max_len, 1.0), *ends[correct])
            for correct, ids in pairs
        ]

    return cosine_scaled_reward


def get_length_reward(best: int, worst: int) -> Reward:
    """Make a reward that is 1.0 at `best` tokens, 0.0 at `worst`, linear between, constant outside.

    best < worst favours short completions, best > worst long ones.

    Raises:
        ValueError: a length is negative, or both are the same.
    """
    _check(best >= 0, best=best)
    _check(worst >= 0 and worst != best, worst=worst)

    def length_reward(completion_ids: Ids, **columns: Any) -> list[float | None]:
        shares = [(len(ids) - worst) / (best - worst) for ids in completion_ids]
        return [min(max(share, 0.0), 1.0) for share in shares]

    return length_reward


def _overlong(length: int, free: int, longest: int) -> float:
    if length <= free:
        return 0.0
    return (free - length) / (longest - free) if length <= longest else -1.0


def _repeated(ids: Sequence[int], n: int) -> float:
    """Share of n-grams that repeat others; 0.0 if there are no n-grams."""
    ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _cosine(progress: float, first: float, last: float) -> float:
    return last + 0.5 * (first - last) * (1.0 + math.cos(progress * math.pi))


def _check(good: bool, **setting: float) -> None:
    if not good:
        ((name, value),) = setting.items()
        raise ValueError(f"{name} is {value}, which is out of range")
