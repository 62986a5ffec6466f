"""Choice of a model's engine, checked once per run on about 40 tokens.

Rollouts pad prompts of different lengths and fork running rows. A family of mlx-lm whose caches do
not support this would silently sample from wrong distributions.
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
from localrl.engines.mlx.adapters import Siblings
from localrl.engines.mlx.engine import MLXEngine, open_engine
from localrl.engines.mlx.prefix_cache import PrefixCache, copied_positions, use_shared_prompts
from localrl.errors import ConfigError
from localrl.policy.engine import Engine
from localrl.policy.model import Policy

LOGGER = logging.getLogger(__name__)

PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 8, 9))
"""Token ids of the two prompts; every vocabulary has them."""
NEXT = (10, 11, 12)
"""Token ids that follow the first prompt and two forks of the second."""
FORK = (0, 1, 1)
"""Prompt that each of the three continues, as a row index."""

Logits = tuple[np.ndarray, np.ndarray]


def choose_engine(
    policy: Policy, engine: str = "auto", warn: Callable[[str], None] = LOGGER.warning
) -> Policy:
    """Choose the engine by comparing padded and forked rows with plain ones on about 40 tokens.

    engine: `model.engine`; with "auto" the CPU engine is used on a CPU if its logits agree.
    Returns the policy with its engine, which shares prompts if the family gives the same logits.

    Raises: ConfigError if the family cannot be decoded in batches or gives different logits there,
    or if `engine` is "cpu" and that engine cannot compute this model.
    """
    made = policy.engine
    mlx = made if isinstance(made, MLXEngine) else open_engine(policy.model)
    expected = _plain(policy.model)
    # Layers are prepared only if this engine is chosen: that takes time, and memory for a moment.
    siblings, mlx = mlx.siblings, replace(mlx, siblings=())
    _check_batching(mlx, expected)
    mlx = _share_prompts(mlx, expected)
    on_cpu = mx.default_device().type == mx.cpu
    if engine == "cpu" or (engine == "auto" and on_cpu):
        tried = _try_cpu(policy.model, expected, engine, warn)
        if tried is not None:
            return replace(policy, engine=tried)
    return replace(policy, engine=_prepare(mlx, siblings, expected, warn))


def _check_batching(engine: MLXEngine, expected: Logits) -> None:
    """Check that the family gives the same logits in batches as for single rows.

    Raises: ConfigError if it does not.
    """
    model = engine.network.model
    family = type(model).__module__.rpartition(".")[2]
    try:
        found = _batched(engine, None)
    except Exception as error:  # a family's own code may raise anything
        raise ConfigError(
            f"This version of mlx-lm cannot decode models of the family {family} in batches "
            f"({type(error).__name__}: {error}), so localrl cannot train them. Use another model."
        ) from error
    for name, a, b in zip(("padded prompts", "forked rows"), found, expected, strict=True):
        error = difference(a, b)
        if not error < tolerance(model):
            raise ConfigError(
                f"With this version of mlx-lm, models of the family {family} give different logits "
                f"for {name} than for single rows (relative error {error:.2g}), so localrl would "
                "train on wrong probabilities. Use another model."
            )


def _share_prompts(engine: MLXEngine, expected: Logits) -> MLXEngine:
    """Let rows read one copy of their prompt, if that gives the same logits."""
    model = engine.network.model
    try:
        use_shared_prompts(model)
        state = _prefill(engine).fork(np.array(FORK), range(len(PROMPTS)))
        shared = [layer for layer in state.cache if isinstance(layer, PrefixCache)]
        state.step(np.array(NEXT))
        close = difference(state.logits(), expected[1]) < tolerance(model)
    except Exception:  # a family's own code may raise anything; its rows then get whole caches
        return engine
    if not shared or not close or not all(layer.attended for layer in shared):
        return engine
    on_cpu = mx.default_device().type == mx.cpu
    copied = 0 if on_cpu else copied_positions(state.cache)
    return replace(engine, shares_prompts=True, copied_positions=copied)


def _prepare(
    engine: MLXEngine,
    siblings: tuple[Siblings, ...],
    expected: Logits,
    warn: Callable[[str], None],
) -> MLXEngine:
    """Let layers with one input be computed together, if that gives the same logits."""
    prepared = replace(engine, siblings=siblings)
    pairs = zip(_batched(prepared, None), expected, strict=True)
    error = max(difference(a, b) for a, b in pairs)
    if error < tolerance(engine.network.model):
        return prepared
    warn(
        "layers computed together give different logits than one by one (relative error "
        f"{error:.2g}), so they are computed one by one, which is slower. Please report this."
    )
    for layer in (layer for group in siblings for layer in group.layers):
        layer.prepared = None
    return engine


def _try_cpu(
    model: Any, expected: Logits, engine: str, warn: Callable[[str], None]
) -> CPUEngine | None:
    """Return the CPU engine if it gives the same logits, with copied and with shared prompts.

    Raises: ConfigError if it does not and `engine` requires it.
    """
    try:
        tried = CPUEngine(CPUModel(model))
        for prompts in (None, range(len(PROMPTS))):
            found = _batched(tried, prompts)
            error = np.max([difference(a, b) for a, b in zip(found, expected, strict=True)])
            if not error < tolerance(model):  # "not <" also catches NaN
                raise ValueError(f"its logits differ from MLX's, relative error {error:.2g}")
        return tried
    except UnfitError as error:
        why = str(error)
    except ConfigError:  # a setting that cannot be satisfied
        raise
    except Exception as error:  # a family's module may have changed
        why = f"{type(error).__name__}: {error}"
        if engine == "auto":
            warn(f"MLX computes this model, more slowly: NumPy cannot ({why}). Please report this.")
    if engine == "cpu":
        raise ConfigError(
            f"model.engine is cpu, but NumPy cannot compute this model ({why}). Set it to auto."
        )
    return None


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error relative to the spread of the expected logits; NaN stays NaN."""
    spread = expected - expected.mean(axis=-1, keepdims=True)
    scale = max(float(np.sqrt((spread**2).mean())), 1e-6)
    return float(np.sqrt(((found - expected) ** 2).mean())) / scale


def tolerance(model: Any) -> float:
    """Tolerated `difference`; 16-bit results depend on the batch shape and only show gross errors.

    A random model of 32 layers differs from its float32 version by 0.03 in bfloat16, by 0.003 in
    float16.
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
