"""mlx-lm's models on MLX's default device, behind the door of `policy.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from localrl.backend import mx
from localrl.engines.mlx import decode, logprobs
from localrl.engines.mlx.checkpointing import can_checkpoint, checkpointed
from localrl.engines.mlx.network import Network
from localrl.policy.packing import MicroBatch


@dataclass(frozen=True)
class MLXEngine:
    """Any family that mlx-lm decodes in batches: see `Engine`."""

    network: Network
    shares_prompts: bool = False
    """Whether rows may read the keys and values of one prompt: see `prefix_cache`."""

    @property
    def name(self) -> Literal["mlx"]:
        """As `model.engine` has it."""
        return "mlx"

    @property
    def splits_head(self) -> bool:
        """Whether the family's body and head could be told apart."""
        return self.network.hidden is not None

    @property
    def packs_forests(self) -> bool | None:
        """Some families do, where body and head are apart."""
        return None if self.splits_head else False

    @property
    def kernels(self) -> None:
        """None of ours."""
        return

    def use_kernels(self, kernels: Any) -> None:
        """Nothing to choose."""

    def can_recompute(self) -> bool:
        """Whether the family's blocks can be checkpointed."""
        return can_checkpoint(self.network)

    def decode_numbers(self) -> int | None:
        """Not counted."""
        return None

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> decode.MLXPrefilled:
        """Run right-padded prompts (P, L)."""
        return decode.prefill(self.network, tokens, lengths)

    def token_logprobs(
        self,
        micro: MicroBatch,
        *,
        temperature: float,
        head_chunk: int,
        gradient: bool = False,
        recompute: bool = False,
    ) -> mx.array:
        """Float32 log-probabilities (N,); what a gradient needs is in MLX's graph in any case."""
        with checkpointed(self.network) if recompute else nullcontext():
            return logprobs.token_logprobs(
                self.network, micro, temperature=temperature, head_chunk=head_chunk
            )

    def head_logprobs(
        self, states: np.ndarray, targets: np.ndarray, *, temperature: float, chunk: int
    ) -> np.ndarray:
        """The head's part alone, from states (N, d)."""
        assert self.network.head is not None
        found = logprobs.head_logprobs(
            self.network.head, mx.array(states), mx.array(targets), temperature, chunk
        )
        return np.array(found)
