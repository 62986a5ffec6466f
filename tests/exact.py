"""What was recorded while decoding, against full forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.backend import mx
from localrl.records import Group


def assert_exact(policy: Any, groups: Sequence[Group], temperature: float = 1.0) -> None:
    """Every completion's log-probabilities and entropies equal those of one forward over it."""
    for group in groups:
        for completion in group.completions():
            tokens = np.concatenate([group.prompt_ids, completion.token_ids])
            logits = policy.model(mx.array(tokens[None]))[0].astype(mx.float32) / temperature
            table = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            table = table[len(group.prompt_ids) - 1 : -1]
            chosen = table[np.arange(len(completion)), completion.token_ids]
            np.testing.assert_allclose(completion.sampled_logprobs, chosen, atol=1e-4)
            entropies = -(np.exp(table) * table).sum(-1)
            np.testing.assert_allclose(completion.entropies, entropies, atol=1e-4)
