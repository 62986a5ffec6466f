"""A model of mlx-lm as functions: the whole, and body and head where they can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localrl.backend import mx


@dataclass(frozen=True)
class Network:
    """A model whose parameters are read at each call."""

    model: Any
    """(B, L) tokens to (B, L, V) logits."""
    hidden: Callable[..., mx.array] | None = None
    """(B, L) tokens to (B, L, d) states before the head; None where the family hides them."""
    head: Callable[[mx.array], mx.array] | None = None
    """(N, d) states to (N, V) logits."""


def open_network(model: Any) -> Network:
    """The model, with body and head checked against the whole.

    Families whose body is `model.model` and whose head is `lm_head` or the tied embedding agree,
    also as the text part of a model that sees images; others (scaled or capped logits) do not, and
    have neither: their logits are made whole.
    """
    probe = mx.array([[1, 2, 3, 4]])
    try:
        whole_text = model.language_model if "language_model" in model else model
        body = whole_text.model
        head = whole_text.lm_head if "lm_head" in whole_text else body.embed_tokens.as_linear
        parts = head(body(probe))
    except (AttributeError, TypeError, ValueError):
        return Network(model)
    whole = model(probe)
    if parts.shape != whole.shape or not mx.allclose(parts, whole, rtol=1e-3, atol=1e-3).item():
        return Network(model)
    return Network(model, body, head)
