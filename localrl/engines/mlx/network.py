"""An mlx-lm model as functions: the whole, and body and head if they can be separated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.backend import mx, nn
from localrl.policy.precision import float_kinds
from localrl.policy.selfcheck import Check, difference

SMALL_IDS = tuple(range(1, 17))
"""Token ids for probes without a tokenizer; every vocabulary has them."""
SPLIT_LIMIT = 1e-4
"""Limit of the difference between whole and parts, which compute the same graph."""


@dataclass(frozen=True)
class Network:
    """A model whose parameters are read at each call, except those of a `Float32Head`."""

    model: Any
    """Maps tokens (B, L) to logits (B, L, V)."""
    hidden: Callable[..., mx.array] | None = None
    """Maps tokens (B, L) to hidden states (B, L, d) before the head; None if inaccessible."""
    head: Callable[[mx.array], mx.array] | None = None
    """Maps hidden states (N, d) to logits (N, V)."""
    probe: tuple[int, ...] = SMALL_IDS
    """At least 16 tokens that self-checks use."""
    split: Check | None = None
    """Difference between the whole and its parts; None if there are no parts to compare."""

    def last_logits(self, tokens: mx.array, cache: list[Any], at: Any = -1) -> mx.array:
        """Run tokens (B, L) with a cache; return logits (B, V) at position `at` of each row.

        The head runs only there, if the family allows it. at: -1, or lengths (B,) minus 1.
        """
        rows = slice(None) if isinstance(at, int) else mx.arange(len(tokens))
        if self.hidden is None or self.head is None:
            return self.model(tokens, cache=cache)[rows, at]
        return self.head(self.hidden(tokens, cache=cache)[rows, at])


@contextmanager
def in_training(model: Any, wanted: bool = True) -> Iterator[None]:
    """Within this context a model's layers have a gradient, if it is wanted.

    Some of mlx-lm's, such as gated delta nets, have kernels without one outside of training.
    """
    before = model.training
    model.train(wanted)
    try:
        yield
    finally:
        model.train(before)


def open_network(model: Any, probe: tuple[int, ...] = SMALL_IDS) -> Network:
    """Open a model, checking its body and head against the whole. probe: see `Network`.

    The body is `model.model` or `model.backbone`, also in the text part of a vision model. In most
    families the head is `lm_head` or the tied embedding; where that gives other logits (scaled or
    capped ones), it is all that the model does after its body. Families where neither agrees get
    none: their logits are computed by the whole model. Logits that are not numbers agree if they
    are the same ones.
    """
    tokens = mx.array([probe[:4]])
    whole = np.array(model(tokens).astype(mx.float32))
    try:
        text = model.language_model if "language_model" in model else model
        body = getattr(text, _body_name(text))
        layer = text.lm_head if "lm_head" in text else body.embed_tokens
        states = body(tokens)[0]
    except (AttributeError, TypeError, ValueError):
        return Network(model, probe=probe)
    plain = layer if "lm_head" in text else getattr(layer, "as_linear", None)
    split = _compare(plain, states, whole)
    if split.accepted:
        packed = isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        # Scales that are bytes do not tell the dtype of activations; in float32 nothing changes.
        sixteen = packed and (layer.mode != "affine" or not float_kinds(layer) <= {mx.float32})
        return Network(model, body, Float32Head(layer) if sixteen else plain, probe, split)
    rest = AfterBody(text)
    other = _compare(rest, states, whole)
    if other.accepted:
        return Network(model, body, rest, probe, other)
    return Network(model, probe=probe, split=split)


def _body_name(text: Any) -> str:
    return "backbone" if "backbone" in text else "model"


def _compare(head: Any, states: mx.array, whole: np.ndarray) -> Check:
    """Compare the logits of a head with those of the whole model (1, L, V)."""
    error = math.inf
    try:
        parts = np.array(head(states).astype(mx.float32))[None]
    except (AttributeError, TypeError, ValueError):  # a family's own code
        parts = np.zeros(0)
    if parts.shape == whole.shape:
        same = np.array_equal(whole, parts, equal_nan=True)
        error = 0.0 if same else difference(parts, whole)
    return Check("body_and_head", error, SPLIT_LIMIT, SPLIT_LIMIT)


class AfterBody:
    """A head that is all that a text model does with its body's states: caps, factors and so on."""

    def __init__(self, text: Any) -> None:
        self._text = text

    def __call__(self, states: mx.array) -> mx.array:
        """Map hidden states (N, d) to logits (N, V)."""
        name = _body_name(self._text)
        body = getattr(self._text, name)
        self._text[name] = _Given(body, states[None])
        try:
            return self._text(mx.zeros((1, len(states)), mx.int32))[0]
        finally:
            self._text[name] = body


class _Given:
    """A stand-in for a body that has these states already; other attributes are the body's own."""

    def __init__(self, body: Any, states: mx.array) -> None:
        self._body, self._states = body, states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self._states


class Float32Head:
    """A quantised head with 16-bit scales that computes logits in float32.

    16-bit logits are rounded to 1/8 between 16 and 32 in bfloat16. It shares the layer's packed
    weights and holds its own copy of the scales in float32, cast once.
    """

    def __init__(self, layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> None:
        self._layer = layer
        self._scales, self._biases, self._bias = (
            _float32(layer.get(name)) for name in ("scales", "biases", "bias")
        )

    def __call__(self, states: mx.array) -> mx.array:
        logits = mx.quantized_matmul(
            states.astype(mx.float32),
            self._layer.weight,
            scales=self._scales,
            biases=self._biases,
            transpose=True,
            group_size=self._layer.group_size,
            bits=self._layer.bits,
            mode=self._layer.mode,
        )
        return logits if self._bias is None else logits + self._bias


def _float32(array: mx.array | None) -> Any:
    """Return the array in float32 if it holds floats; scales of some modes are integers."""
    if array is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(mx.float32)
