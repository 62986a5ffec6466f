"""The door to what computes a model: prefill, decode steps, log-probabilities with their gradient.

Two packages stand behind it: `engines.mlx`, which runs mlx-lm's models on MLX's default device, and
`engines.cpu`, NumPy and C for Linux CPUs. What passes through the door are small NumPy arrays, but
for log-probabilities, which MLX differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from localrl.backend import mx
from localrl.policy.packing import MicroBatch


class Sampled(NamedTuple):
    """One token of each row, (B,) each."""

    tokens: np.ndarray
    logprobs: np.ndarray
    """Nats, at the temperature that was asked for."""
    entropies: np.ndarray
    """Nats, of the whole distribution."""


class DecodeState(Protocol):
    """Rows being decoded: their caches, and the logits of each row's next token."""

    def __len__(self) -> int: ...

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows only; an index that repeats forks its row."""
        ...

    def extend(self, other: Any) -> None:
        """Add the rows of another state of the same engine."""
        ...

    def sample(self, uniforms: np.ndarray | None, temperature: float) -> Sampled:
        """One token per row, by inverting the cumulative distribution in float32.

        uniforms (B,) in (0, 1). At temperature 0 they are None, the likeliest token is taken, and
        log-probabilities and entropies are those of temperature 1.
        """
        ...

    def entropies(self, temperature: float) -> np.ndarray:
        """Entropy (B,) in nats of each row's next-token distribution; at temperature 0 as at 1."""
        ...

    def step(self, tokens: np.ndarray) -> None:
        """Feed one token (B,) to each row. It may still be computing when this returns."""
        ...

    def wait(self) -> None:
        """Return once all that was begun is computed."""
        ...

    def logits(self) -> np.ndarray:
        """Float32 logits (B, V) of each row's next token."""
        ...


class Prefilled(Protocol):
    """Prompts that rows can go on from; forking leaves them as they are."""

    def fork(self, rows: np.ndarray, prompts: Sequence[int] | None) -> DecodeState:
        """A state of B rows, each of which goes on from one of the prompts.

        rows: (B,) int, which prompt that is. prompts: the key of each prompt, for rows to share its
        keys and values; two states with the same key have the same prompt. None: copies.
        """
        ...

    def logits(self) -> np.ndarray:
        """Float32 logits (P, V) after each prompt."""
        ...


class Engine(Protocol):
    """What computes one model, with its adapters as they are at each call."""

    @property
    def name(self) -> Literal["mlx", "cpu"]:
        """As `model.engine` has it."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether rows may share the keys and values of a prompt."""
        ...

    @property
    def splits_head(self) -> bool:
        """Whether body and head are apart, so that logits are made of trained positions alone."""
        ...

    @property
    def packs_forests(self) -> bool | None:
        """Whether forests score as plain rows do; None: it depends on the family, to be tried."""
        ...

    @property
    def kernels(self) -> Any:
        """Record of the compiled steps, on which rounding depends; None where there are none."""
        ...

    def use_kernels(self, kernels: Any) -> None:
        """Compute with those of an earlier run.

        Raises: ConfigError when this machine cannot.
        """
        ...

    def can_recompute(self) -> bool:
        """Whether the blocks' activations can be computed again in the backward pass."""
        ...

    def decode_numbers(self) -> int | None:
        """Weights that a decode step reads, each once for all rows; None where that is unknown."""
        ...

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> Prefilled:
        """Run right-padded prompts (P, L) of these lengths; all is computed when this returns."""
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
        """Float32 log-probabilities (N,) of a micro-batch's targets.

        The distribution is that of the sampler: logits divided by the temperature, over the whole
        vocabulary; the logits of `head_chunk` positions exist at a time. gradient: the result is
        differentiated by the adapters; with `recompute` what goes on inside a block is computed
        again then.
        """
        ...

    def head_logprobs(
        self, states: np.ndarray, targets: np.ndarray, *, temperature: float, chunk: int
    ) -> np.ndarray:
        """The head's part of it alone, from states (N, d): to be timed."""
        ...
