"""The format of a model's floats: `model.dtype`, and a trial of float16 for models in bfloat16.

bfloat16 and float16 take two bytes. float16 has three more bits of mantissa, so sampler and update
agree better (docs/models.md), but it ends at 65504. On a GPU, a model stored in bfloat16 is cast to
float16 if a few prompts, with gradient, stay far below that; otherwise it stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from localrl.backend import mx, nn, tree_flatten
from localrl.engines.mlx.checkpointing import body_of
from localrl.engines.mlx.logprobs import gather_logprobs
from localrl.engines.mlx.network import Network, in_training
from localrl.policy.model import FloatChoice, LoadedModel
from localrl.policy.precision import (
    cast_floats,
    dequantise,
    float32_activations,
    float_kinds,
    match_embeddings,
)
from localrl.policy.selfcheck import Check, difference

KINDS = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
FLOAT16_LIMITS = 3e4, 65504.0
"""Largest hidden state in float16 from which to warn, and the largest number of the format."""
WEIGHTS_LIMITS = 1e-2, 1e-2
"""Relative error of logits, in float32, that casting the weights may cause; computing in bfloat16
causes more. It has fewer bits of mantissa, so only numbers below 1e-5, and above 65504, change."""
TRIED, TRIED_TOKENS = 3, 64
"""Number of prompts of a trial, and the maximum number of their tokens."""

Prompts = Sequence[Sequence[int]]


def settle_floats(
    loaded: LoadedModel, wish: str | None, prompts: Prompts, *, for_cpu: bool, dense: bool
) -> tuple[FloatChoice | None, list[Check]]:
    """Cast the model's floats in place; return the choice and its checks.

    wish: `model.dtype`; None leaves a GPU's floats as stored. prompts: tokens for a trial of
    float16. dense: the model was dequantised.
    """
    model = loaded.model
    if wish == "fp32" or (for_cpu and wish in (None, "auto")):
        cast_floats(model, mx.float32)
        return FloatChoice("fp32", "as set" if wish == "fp32" else "the CPU computes float32"), []
    if wish in KINDS:
        cast_floats(model, KINDS[wish])
        checks = [float16_range(model, prompts)] if wish == "fp16" else []
        return FloatChoice(wish, "as set"), checks
    if wish is None:
        return None, []
    return _try_float16(loaded, prompts, dense)


def _try_float16(
    loaded: LoadedModel, prompts: Prompts, dense: bool
) -> tuple[FloatChoice, list[Check]]:
    """Cast bfloat16 to float16 if that keeps the weights and the prompts stay in its range."""
    model = loaded.model
    stored = " and ".join(name for name, kind in KINDS.items() if kind in float_kinds(model))
    if mx.bfloat16 not in float_kinds(model) or loaded.reload is None:
        return FloatChoice(stored, "as stored"), []
    expected = _exact_logits(model, prompts[0])
    cast_floats(model, mx.float16, only=mx.bfloat16)
    lost = difference(_exact_logits(model, prompts[0]), expected)
    checks = [
        Check("float16_weights", lost, *WEIGHTS_LIMITS),
        float16_range(model, prompts),
    ]
    if all(check.verdict == "ok" for check in checks):
        largest = f"{checks[1].value:.3g} is the largest hidden state of a trial"
        return FloatChoice("fp16", f"stored as {stored}; {largest}"), checks
    fresh = loaded.reload()  # float16 has lost what is too large or too small for it
    if dense:
        dequantise(fresh, as_float32=False)
    model.update(fresh.parameters())
    match_embeddings(model)
    return FloatChoice(stored, f"as stored; {_obstacle(*checks)}"), []


def _obstacle(weights: Check, hidden: Check) -> str:
    """Say why the model is not computed in float16."""
    if weights.verdict != "ok":
        return f"weights are too small or too large for fp16 (relative error {weights.value:.2g})"
    if not math.isfinite(hidden.value):
        return "in fp16, logits or gradients are not finite"
    return f"hidden states of {hidden.value:.3g} are too large for fp16"


def _exact_logits(model: Any, prompt: Sequence[int]) -> np.ndarray:
    """Float32 logits (L, V) of the weights as they are."""
    with float32_activations(model):
        return np.array(model(mx.array([list(prompt[:TRIED_TOKENS])]))[0].astype(mx.float32))


def float16_range(model: Any, prompts: Prompts) -> Check:
    """Measure the largest hidden state between the blocks over a few prompts, gradient included.

    It is infinite if a log-probability or a gradient is not finite.
    """
    frozen = [module for module in model.modules() if "weight" in module]
    model.freeze()
    for module in frozen:
        if module.weight.ndim == 1:  # a norm, whose gradient comes through all later blocks
            module.unfreeze(keys=["weight"], recurse=False)
    try:
        largest = max(_largest(model, prompt[:TRIED_TOKENS]) for prompt in prompts[:TRIED])
    finally:
        model.freeze()
    return Check("float16_range", largest, *FLOAT16_LIMITS)


def _largest(model: Any, prompt: Sequence[int]) -> float:
    """The largest hidden state of one prompt."""
    tokens = mx.array([list(prompt)])

    def score() -> tuple[mx.array, list[mx.array]]:
        with in_training(model), _watched(model) as seen:
            logits = model(tokens)[0, :-1]
            return gather_logprobs(logits, tokens[0, 1:], 1.0).sum(), list(seen)

    (total, seen), gradient = nn.value_and_grad(model, score)()
    leaves: Any = tree_flatten(gradient)
    finite = mx.stack([mx.isfinite(array).all() for array in (total, *(g for _, g in leaves))])
    largest: Any = mx.stack([mx.array(0.0), *seen]).max().item()
    return largest if finite.all().item() and math.isfinite(largest) else math.inf


@contextmanager
def _watched(model: Any) -> Iterator[list[mx.array]]:
    """Within this context, collect the largest magnitude of each block's output."""
    seen: list[mx.array] = []
    body = body_of(Network(model))
    if body is None:  # blocks elsewhere: only the result can be looked at
        yield seen
        return
    blocks = body.layers
    body.layers = [_MeasuredBlock(block, seen) for block in blocks]
    try:
        yield seen
    finally:
        body.layers = blocks


class _MeasuredBlock:
    """A stand-in for a block that measures its output; other attributes are the block's own."""

    def __init__(self, block: nn.Module, seen: list[mx.array]) -> None:
        self._block, self._seen = block, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._block(*args, **kwargs)
        states = result[0] if isinstance(result, tuple) else result
        self._seen.append(mx.stop_gradient(mx.abs(states).max()).astype(mx.float32))
        return result
