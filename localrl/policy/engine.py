"""The engine protocol: prefill, decode steps, log-probabilities with their gradient.

Two packages implement it: `engines.mlx`, which runs mlx-lm's models on MLX's default device, and
`engines.cpu`, NumPy and C for Linux CPUs. Only small NumPy arrays cross this interface, except
log-probabilities, which MLX differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from localrl.backend import mx
from localrl.policy.packing import MicroBatch
from localrl.policy.selfcheck import Check


class Sampled(NamedTuple):
    """One sampled token per row, each field (B,)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    """Log-probabilities in nats, at the requested temperature."""
    entropies: np.ndarray
    """Entropies of the whole distribution, in nats."""


class DecodeState(Protocol):
    """Rows being decoded: their caches, and the logits of each row's next token."""

    def __len__(self) -> int: ...

    def select(self, rows: np.ndarray) -> None:
        """Keep only these rows; a repeated index forks its row."""
        ...

    def extend(self, other: Any) -> None:
        """Add the rows of another state of the same engine."""
        ...

    def sample(
        self, uniforms: np.ndarray | None, temperature: float, *, ahead: bool = False
    ) -> Sampled:
        """Sample one token per row by inverting the cumulative distribution in float32.

        uniforms: (B,) in (0, 1). At temperature 0 they are None, the likeliest token is taken, and
        log-probabilities and entropies are those of temperature 1. ahead: also feed the tokens, as
        `step` would, before they are read; for engines that look ahead.
        """
        ...

    def entropies(self, temperature: float) -> np.ndarray:
        """Return the entropy (B,) in nats of each row's next token; temperature 0 counts as 1."""
        ...

    def step(self, tokens: np.ndarray) -> None:
        """Feed one token (B,) to each row. It may still be computing when this returns."""
        ...

    def wait(self) -> None:
        """Block until all pending computation is done."""
        ...

    def logits(self) -> np.ndarray:
        """Return float32 logits (B, V) of each row's next token."""
        ...


class Prefilled(Protocol):
    """Prefilled prompts that rows can continue from; forking does not change them."""

    def fork(self, rows: np.ndarray, prompts: Sequence[int] | None) -> DecodeState:
        """Create a state of B rows, each continuing one of the prompts.

        rows: (B,) int, index of each row's prompt. prompts: the key of each prompt, to let rows
        share its KV cache; two states with the same key have the same prompt. None: copy.
        """
        ...

    def logits(self) -> np.ndarray:
        """Return float32 logits (P, V) after each prompt."""
        ...


class Engine(Protocol):
    """Computes one model, with its adapters as they are at each call."""

    @property
    def name(self) -> Literal["mlx", "cpu"]:
        """Name used in `model.engine`."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """True if rows may share the KV cache of a prompt."""
        ...

    @property
    def copied_positions(self) -> int:
        """Positions of prompts that are read faster as copies in every row than shared; 0 if there
        is nothing to say beyond what holds on every CPU."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """True if sampling is faster with the next step already queued, even though rows that have
        just ended then compute one more token."""
        ...

    @property
    def splits_head(self) -> bool:
        """True if body and head are separate, so logits are computed only at trained positions."""
        ...

    @property
    def packs_forests(self) -> bool | None:
        """True if forests score like plain rows; None if it depends on the family and must be
        tested."""
        ...

    @property
    def kernels(self) -> Any:
        """Record of the compiled kernels, which determine rounding; None if there are none."""
        ...

    def use_kernels(self, kernels: Any) -> None:
        """Use the kernels of an earlier run.

        Raises: ConfigError if this machine cannot run them.
        """
        ...

    def check_recompute(self) -> Check:
        """Check that block activations can be recomputed in the backward pass."""
        ...

    def decode_numbers(self) -> int | None:
        """Count the weights that a decode step reads, each once for all rows; None if unknown."""
        ...

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> Prefilled:
        """Run right-padded prompts (P, L) of these lengths, and wait for the result."""
        ...

    def token_logprobs(
        self,
        micro: MicroBatch,
        *,
        temperature: float,
        head_chunk: int,
        gradient: bool = False,
        recompute: bool = False,
    ) -> mx.array:
        """Compute float32 log-probabilities (N,) of a micro-batch's targets.

        The distribution is the sampler's: logits divided by the temperature, over the whole
        vocabulary. The logits of only `head_chunk` positions are held at once. gradient: the
        result is differentiable w.r.t. the adapters; with `recompute`, block activations are
        recomputed in the backward pass.
        """
        ...

    def head_logprobs(
        self, states: np.ndarray, targets: np.ndarray, *, temperature: float, chunk: int
    ) -> np.ndarray:
        """Compute only the head's part, from hidden states (N, d); used for timing."""
        ...
