"""What was recorded while decoding, against full forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.records import Completion, Group


def assert_exact(policy: Any, groups: Sequence[Group], temperature: float = 1.0) -> None:
    """Every completion's log-probabilities and entropies equal those of one forward over it."""
    for group in groups:
        for completion in group.completions():
            table = logprob_table(policy, group, completion, temperature)
            chosen = table[np.arange(len(completion)), completion.token_ids]
            np.testing.assert_allclose(completion.sampled_logprobs, chosen, atol=1e-4)
            entropies = -(np.exp(table) * table).sum(-1)
            np.testing.assert_allclose(completion.entropies, entropies, atol=1e-4)


def logprob_table(
    policy: Any, group: Group, completion: Completion, temperature: float = 1.0
) -> np.ndarray:
    """(T, V) log-probabilities of every token at each place of a completion, from MLX's logits.

    In 64 bits: MLX's own sum over a real vocabulary is wrong by some 2e-4 on the CPU.
    """
    tokens = np.concatenate([group.prompt_ids, completion.token_ids])
    logits = policy.model(mx.array(tokens[None]))[0].astype(mx.float32)
    shifted = np.array(logits, np.float64)[len(group.prompt_ids) - 1 : -1] / temperature
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
