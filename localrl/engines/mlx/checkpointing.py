"""Gradient checkpointing: activations inside a block are recomputed in the backward pass.

The forward pass only keeps each block's input and, in a forest, the keys and values that child
levels attend to, each row once. Paper: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from localrl.backend import mx, nn, tree_flatten, tree_map
from localrl.engines.mlx.forest import AnyLevel, LevelCache, LevelState, Own
from localrl.engines.mlx.network import Network, in_training
from localrl.policy.precision import float32_activations
from localrl.policy.selfcheck import Check

LEVELS = (LevelCache, LevelState)
RECOMPUTED_LIMIT = 1e-3
"""Limit of the relative error of a gradient from recomputed blocks: it is the same graph."""
PROBED = 12
"""Tokens of the passes that check this: more than eight, because for up to eight queries mlx 0.32.4
takes its vector kernels, and on Metal these raise an error in the gradient of causal attention."""


@contextmanager
def checkpointed(network: Network) -> Iterator[None]:
    """Within this context a forward pass keeps only each block's input for its gradient.

    It works for passes over rows without a cache and over forests. It must be used inside the
    differentiated function, since the model has no parameters in its blocks meanwhile, and only
    with models that `check_recompute` accepts. Its blocks are restored afterwards.
    """
    body = body_of(network)
    assert body is not None
    blocks = body.layers
    recomputed = [_Recomputed(block) for block in blocks]
    body.layers = recomputed
    try:
        yield
    finally:
        body.layers = blocks
    assert all(block.called for block in recomputed)


def check_recompute(network: Network) -> Check:
    """Compare the gradient from recomputed blocks with the plain one, in two short passes.

    A family may keep its blocks elsewhere, or pass values between blocks other than their inputs:
    then the error is infinite.
    """
    error = math.inf
    if body_of(network) is not None:
        with float32_activations(network.model):
            error = _recompute_error(network)
    return Check("recomputed_gradient", error, RECOMPUTED_LIMIT, RECOMPUTED_LIMIT)


def _recompute_error(network: Network) -> float:
    """Relative error of the gradient from recomputed blocks."""
    plain = _probe(network, nullcontext())
    try:
        again = _probe(network, checkpointed(network))
    except Exception:  # a family's own code may raise anything; plain passes still work
        return math.inf
    wrong = mx.stack([mx.square(again[name] - plain[name]).sum() for name in plain]).sum()
    size = mx.stack([mx.square(array).sum() for array in plain.values()]).sum()
    if not wrong.item():
        return 0.0
    return float(np.sqrt(np.array(wrong / size)))


class _Recomputed:
    """A stand-in for a block that recomputes when called; other attributes are the block's own."""

    def __init__(self, block: nn.Module) -> None:
        self.called = False
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return _run(self._block, args, kwargs)


def _run(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the block through a checkpointed function of everything that may need a gradient.

    The function runs again in the backward pass, so it gets a fresh cache each time; the keys and
    values that the block puts into the cache are returned as a result.
    """
    call = (list(args), dict(kwargs))
    cache: Any = next((a for a in (*args, *kwargs.values()) if isinstance(a, LEVELS)), None)

    def compute(trainable: Any, given: list[mx.array], lineage: list[Own]) -> tuple[Any, Own]:
        renewed = None if cache is None else cache.renewed(lineage)
        arrays = iter(given)
        swapped = tree_map(lambda leaf: _swap(leaf, arrays, renewed), call)
        before = block.trainable_parameters()
        try:
            block.update(trainable)
            with in_training(block):
                result = block(*swapped[0], **swapped[1])
        finally:
            block.update(before)
        # Results are kept in memory, so the last level, to which none attends, returns none.
        own = () if renewed is None or renewed.last else renewed.own or ()
        # Views, since a block may return the same arrays, and of two equal results MLX's gradient
        # sees only one.
        return result, tuple(mx.squeeze(mx.expand_dims(array, 0), 0) for array in own)

    leaves: Any = tree_flatten(call)
    given = [leaf for _, leaf in leaves if _floating(leaf)]
    lineage = [] if cache is None else cache.lineage()
    result, own = mx.checkpoint(compute)(block.trainable_parameters(), given, lineage)
    if cache is not None and own:
        cache.own = own
    return result


def _swap(leaf: Any, arrays: Iterator[mx.array], cache: AnyLevel | None) -> Any:
    """Replace caches and floating arrays of an argument; others, e.g. masks, need no gradient."""
    if isinstance(leaf, LEVELS):
        return cache
    return next(arrays) if _floating(leaf) else leaf


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def body_of(network: Network) -> Any:
    """Return the module that holds the list of blocks; None if they are elsewhere."""
    if network.hidden is not None:
        body = network.hidden
    else:
        whole = network.model.language_model if "language_model" in network.model else network.model
        body = getattr(whole, "model", None)
    return body if isinstance(body, nn.Module) and "layers" in body else None


def _probe(network: Network, context: AbstractContextManager[None]) -> dict[str, mx.array]:
    """Gradient of a scalar function of all logits w.r.t. every adapter's weights."""

    def loss() -> mx.array:
        with in_training(network.model), context:
            logits = network.model(mx.array([network.probe[:PROBED]]))
        return mx.square(logits.astype(mx.float32)).mean()

    gradient: Any = nn.value_and_grad(network.model, loss)()[1]
    return dict(tree_flatten(gradient))
