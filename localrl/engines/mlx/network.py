"""An mlx-lm model as functions: the whole, and body and head if they can be separated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localrl.backend import mx


@dataclass(frozen=True)
class Network:
    """A model whose parameters are read at each call."""

    model: Any
    """Maps tokens (B, L) to logits (B, L, V)."""
    hidden: Callable[..., mx.array] | None = None
    """Maps tokens (B, L) to hidden states (B, L, d) before the head; None if inaccessible."""
    head: Callable[[mx.array], mx.array] | None = None
    """Maps hidden states (N, d) to logits (N, V)."""

    def last_logits(self, tokens: mx.array, cache: list[Any], at: Any = -1) -> mx.array:
        """Run tokens (B, L) with a cache; return logits (B, V) at position `at` of each row.

        The head runs only there, if the family allows it. at: -1, or lengths (B,) minus 1.
        """
        rows = slice(None) if isinstance(at, int) else mx.arange(len(tokens))
        if self.hidden is None or self.head is None:
            return self.model(tokens, cache=cache)[rows, at]
        return self.head(self.hidden(tokens, cache=cache)[rows, at])


def open_network(model: Any) -> Network:
    """Open a model, checking its body and head against the whole.

    Families whose body is `model.model` and whose head is `lm_head` or the tied embedding agree,
    also as the text part of a vision model; others (with scaled or capped logits) do not, and get
    neither: their logits are computed by the whole model.
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
