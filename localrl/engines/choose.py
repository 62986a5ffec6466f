"""The engine of a model, checked once per run with some 40 tokens.

Rollouts pad prompts of different lengths and fork running rows. A family of mlx-lm whose caches do
not hold that would sample from wrong distributions without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localrl.backend import mx, tree_flatten
from localrl.engines.cpu.engine import CPUEngine
from localrl.engines.cpu.model import CPUModel, UnfitError
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.network import open_network
from localrl.engines.mlx.prefix_cache import PrefixCache, use_shared_prompts
from localrl.errors import ConfigError
from localrl.policy.engine import Engine
from localrl.policy.model import Policy

LOGGER = logging.getLogger(__name__)

PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 8, 9))
"""Token ids of the two prompts; every vocabulary has them."""
NEXT = (10, 11, 12)
"""The token after the first prompt, and those after two forks of the second."""
FORK = (0, 1, 1)
"""Rows of the batch that the three go on from."""

Logits = tuple[np.ndarray, np.ndarray]


def choose_engine(
    policy: Policy, engine: str = "auto", warn: Callable[[str], None] = LOGGER.warning
) -> Policy:
    """Compare padded and forked rows with plain ones; some 40 tokens through the model.

    engine: `model.engine`; with "auto" a CPU computes in NumPy what it computes right there.
    Returns the policy with its engine, which shares prompts where the family computes the same so.

    Raises: ConfigError when the family cannot be decoded in batches, or gives other logits there;
    and when the engine is to be the CPU's and does not compute this model.
    """
    made = policy.engine
    mlx = MLXEngine(made.network if isinstance(made, MLXEngine) else open_network(policy.model))
    expected = _plain(policy.model)
    _check_batching(mlx, expected)
    mlx = replace(mlx, shares_prompts=_shares_prompts(mlx, expected))
    on_cpu = mx.default_device().type == mx.cpu
    chosen: MLXEngine | CPUEngine = mlx
    if engine == "cpu" or (engine == "auto" and on_cpu):
        chosen = _in_arrays(policy.model, expected, engine, warn) or mlx
    return replace(policy, engine=chosen)


def _check_batching(engine: MLXEngine, expected: Logits) -> None:
    """Raises: ConfigError when the family does not decode batches as it computes single rows."""
    model = engine.network.model
    family = type(model).__module__.rpartition(".")[2]
    try:
        found = _batched(engine, None)
    except Exception as error:  # whatever a family's own code raises
        raise ConfigError(
            f"Models of the family {family} cannot be decoded in batches with this mlx-lm "
            f"({type(error).__name__}: {error}), so localrl cannot train them. Use another model."
        ) from error
    for name, a, b in zip(("padded prompts", "forked rows"), found, expected, strict=True):
        error = difference(a, b)
        if not error < tolerance(model):
            raise ConfigError(
                f"With this mlx-lm, models of the family {family} compute something else for "
                f"{name} than for single ones (relative error {error:.2g}), so that localrl would "
                "train on wrong probabilities. Use another model."
            )


def _shares_prompts(engine: MLXEngine, expected: Logits) -> bool:
    """Whether rows that read one copy of their prompt compute the same."""
    model = engine.network.model
    try:
        use_shared_prompts(model)
        state = _prefill(engine).fork(np.array(FORK), range(len(PROMPTS)))
        shared = [layer for layer in state.cache if isinstance(layer, PrefixCache)]
        state.step(np.array(NEXT))
        close = difference(state.logits(), expected[1]) < tolerance(model)
    except Exception:  # whatever a family's own code raises; its rows then have whole caches
        return False
    return bool(shared) and close and all(layer.attended for layer in shared)


def _in_arrays(
    model: Any, expected: Logits, engine: str, warn: Callable[[str], None]
) -> CPUEngine | None:
    """The CPU's engine, if it gives the same logits, with copied prompts and with shared ones.

    Raises: ConfigError when `engine` insists on it and it does not.
    """
    try:
        tried = CPUEngine(CPUModel(model))
        for prompts in (None, range(len(PROMPTS))):
            found = _batched(tried, prompts)
            error = np.max([difference(a, b) for a, b in zip(found, expected, strict=True)])
            if not error < tolerance(model):  # NaN is not, either
                raise ValueError(f"its logits differ from MLX's, relative error {error:.2g}")
        return tried
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
    return None


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of the expected logits' spread; NaN stays NaN."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    scale = max(float(np.sqrt((spread**2).mean())), 1e-6)
    return float(np.sqrt(((found - expected) ** 2).mean())) / scale


def tolerance(model: Any) -> float:
    """Results in 16 bits depend on the shape of a batch, and only gross errors stand out.

    A random model of 32 layers is 0.03 away from its float32 self in bfloat16, 0.003 in float16.
    """
    parameters: Any = tree_flatten(model.parameters())
    kinds = {array.dtype for _, array in parameters}
    return 0.2 if kinds & {mx.bfloat16, mx.float16} else 1e-3


def _plain(model: Any) -> Logits:
    """Logits after each prompt (2, V) and after the tokens that follow (3, V), without a cache."""
    rows = [(*PROMPTS[row], token) for row, token in zip(FORK, NEXT, strict=True)]
    logits = [np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in rows]
    return np.stack([logits[0][-2], logits[1][-2]]), np.stack([row[-1] for row in logits])


def _batched(engine: Engine, prompts: Sequence[int] | None) -> Logits:
    """The same logits from one padded batch that forks. prompts: see `Prefilled.fork`."""
    prefilled = _prefill(engine)
    state = prefilled.fork(np.array(FORK), prompts)
    state.step(np.array(NEXT))
    return prefilled.logits(), state.logits()


def _prefill(engine: Engine) -> Any:
    most = max(map(len, PROMPTS))
    tokens = np.array([[*prompt, *[0] * (most - len(prompt))] for prompt in PROMPTS], np.int32)
    return engine.prefill(tokens, [len(prompt) for prompt in PROMPTS])
