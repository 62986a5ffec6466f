"""Whether a family decodes batches as it computes single rows: looked at once, with a few tokens.

Rollouts pad prompts of different lengths and fork running rows. A family of mlx-lm whose caches do
not hold that would sample from wrong distributions without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from localrl.backend import mx, tree_flatten
from localrl.errors import ConfigError
from localrl.policy.array_model import ArrayModel, UnfitError
from localrl.policy.model import Policy
from localrl.policy.prefix import PrefixCache, fork_prompts, use_shared_prompts

LOGGER = logging.getLogger(__name__)

PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 8, 9))
"""Token ids of the two prompts; every vocabulary has them."""
NEXT = (10, 11, 12)
"""The token after the first prompt, and those after two forks of the second."""
FORK = (0, 1, 1)
"""Rows of the batch that the three go on from."""


def check_batching(
    policy: Policy, engine: str = "auto", warn: Callable[[str], None] = LOGGER.warning
) -> Policy:
    """Compare padded and forked rows with plain ones; some 40 tokens through the model.

    engine: `model.engine`; with "auto" a CPU computes in NumPy what it computes right there.
    Returns the policy with its engine, which shares prompts where the family computes the same so.

    Raises: ConfigError when the family cannot be decoded in batches, or gives other logits there;
    and when the engine is to be the CPU's and does not compute this model.
    """
    policy = replace(policy, arrays=None)
    family = type(policy.model).__module__.rpartition(".")[2]
    expected = _plain(policy)
    try:
        found = _batched(policy)
    except Exception as error:  # whatever a family's own code raises
        raise ConfigError(
            f"Models of the family {family} cannot be decoded in batches with this mlx-lm "
            f"({type(error).__name__}: {error}), so localrl cannot train them. Use another model."
        ) from error
    for name, a, b in zip(("padded prompts", "forked rows"), found, expected, strict=True):
        error = difference(a, b)
        if not error < tolerance(policy):
            raise ConfigError(
                f"With this mlx-lm, models of the family {family} compute something else for "
                f"{name} than for single ones (relative error {error:.2g}), so that localrl would "
                "train on wrong probabilities. Use another model."
            )
    policy = replace(policy, shares_prompts=_shares_prompts(policy, expected[1]))
    on_cpu = mx.default_device().type == mx.cpu
    if engine == "mlx" or (engine == "auto" and not on_cpu):
        return policy
    try:
        return replace(policy, arrays=_arrays(policy, expected))
    except UnfitError as error:
        why = str(error)
    except ConfigError:  # of a setting that cannot be met
        raise
    except Exception as error:  # a family's module may be built otherwise than it was
        why = f"{type(error).__name__}: {error}"
        if engine == "auto":
            warn(f"MLX computes this model, slower: NumPy cannot ({why}). Please report it.")
    if engine == "cpu":
        raise ConfigError(
            f"model.engine is cpu, but NumPy cannot compute this model ({why}). Set it to auto."
        )
    return policy


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of the expected logits' spread; NaN stays NaN."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    scale = max(float(np.sqrt((spread**2).mean())), 1e-6)
    return float(np.sqrt(((found - expected) ** 2).mean())) / scale


def tolerance(policy: Policy) -> float:
    """Results in 16 bits depend on the shape of a batch, and only gross errors stand out.

    A random model of 32 layers is 0.03 away from its float32 self in bfloat16, 0.003 in float16.
    """
    parameters: Any = tree_flatten(policy.model.parameters())
    kinds = {array.dtype for _, array in parameters}
    return 0.2 if kinds & {mx.bfloat16, mx.float16} else 1e-3


def _plain(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each prompt (2, V) and after the tokens that follow (3, V), without a cache."""
    rows = [(*PROMPTS[row], token) for row, token in zip(FORK, NEXT, strict=True)]
    logits = [np.array(policy.model(mx.array([row]))[0].astype(mx.float32)) for row in rows]
    return np.stack([logits[0][-2], logits[1][-2]]), np.stack([row[-1] for row in logits])


def _batched(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """The same logits from one padded batch that forks."""
    cache, first = _prefill(policy)
    for layer in cache:
        layer.filter(mx.array(FORK))
    second = policy.model(mx.array(NEXT)[:, None], cache=cache)[:, -1]
    return np.array(first.astype(mx.float32)), np.array(second.astype(mx.float32))


def _prefill(policy: Policy) -> tuple[Any, Any]:
    most = max(map(len, PROMPTS))
    tokens = np.array([[*prompt, *[0] * (most - len(prompt))] for prompt in PROMPTS], np.int32)
    return policy.prefill(tokens, [len(prompt) for prompt in PROMPTS])


def _shares_prompts(policy: Policy, expected: np.ndarray) -> bool:
    """Whether rows that read one copy of their prompt give the logits (3, V) after it."""
    try:
        use_shared_prompts(policy.model)
        cache = fork_prompts(_prefill(policy)[0], np.array(FORK), range(len(PROMPTS)))
        shared = [layer for layer in cache if isinstance(layer, PrefixCache)]
        logits = policy.model(mx.array(NEXT)[:, None], cache=cache)[:, -1].astype(mx.float32)
        close = difference(np.array(logits), expected) < tolerance(policy)
    except Exception:  # whatever a family's own code raises; its rows then have whole caches
        return False
    return bool(shared) and close and all(layer.attended for layer in shared)


def _arrays(policy: Policy, expected: tuple[np.ndarray, np.ndarray]) -> ArrayModel:
    """The model for NumPy, which gives the logits of `_plain`, with copied and shared prompts.

    Raises: UnfitError for a model that it is not made for; ValueError when the logits differ.
    """
    tried = replace(policy, arrays=ArrayModel(policy.model))
    cache, first = _prefill(tried)
    found = [(first, expected[0])]
    for names in (None, range(len(PROMPTS))):
        rows = tried.fork(cache, np.array(FORK), names)
        found.append((tried.step(np.array(NEXT), rows), expected[1]))
    error = np.max([difference(np.array(a), b) for a, b in found])  # NaN stays NaN
    if not error < tolerance(policy):
        raise ValueError(f"its logits differ from MLX's, relative error {error:.2g}")
    assert tried.arrays is not None
    return tried.arrays
