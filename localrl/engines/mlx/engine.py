"""The engine for mlx-lm's models on MLX's default device: implements `policy.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from localrl.backend import mx
from localrl.engines.mlx import checkpointing, decode, logprobs
from localrl.engines.mlx.adapters import Siblings, find_siblings, prepare
from localrl.engines.mlx.checkpointing import checkpointed
from localrl.engines.mlx.network import SMALL_IDS, Network, in_training, open_network
from localrl.policy.packing import MicroBatch
from localrl.policy.selfcheck import Check


@dataclass(frozen=True)
class MLXEngine:
    """Any family that mlx-lm decodes in batches: see `Engine`."""

    network: Network
    siblings: tuple[Siblings, ...] = ()
    """Adapted layers to prepare when decoding begins; none: each computes on its own."""
    shares_prompts: bool = False
    """True if rows may share the keys and values of one prompt: see `prefix_cache`."""
    copied_positions: int = 0
    """Positions of prompts that are read faster as copies in every row than shared."""

    @property
    def name(self) -> Literal["mlx"]:
        """Name of the engine in `model.engine`."""
        return "mlx"

    @property
    def splits_head(self) -> bool:
        """True if the family's body and head could be separated."""
        return self.network.hidden is not None

    @property
    def looks_ahead(self) -> bool:
        """True: the device computes a step while Python handles the one before."""
        return True

    @property
    def packs_forests(self) -> bool | None:
        """None, to be checked, if body and head are separate, since only some families do."""
        return None if self.splits_head else False

    @property
    def kernels(self) -> None:
        """None: MLX's own kernels are used."""
        return

    def use_kernels(self, kernels: Any) -> None:
        """Do nothing: there are no kernels to choose."""

    def check_recompute(self) -> Check:
        """Check that the family's blocks can be recomputed."""
        return checkpointing.check_recompute(self.network)

    def decode_numbers(self) -> int | None:
        """None: not counted."""
        return None

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> decode.MLXPrefilled:
        """Run right-padded prompts (P, L)."""
        prepare(self.siblings)
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
        """Float32 log-probabilities (N,); MLX's graph always keeps what a gradient needs."""
        recomputed = checkpointed(self.network) if recompute else nullcontext()
        with in_training(self.network.model, gradient), recomputed:
            return logprobs.token_logprobs(
                self.network, micro, temperature=temperature, head_chunk=head_chunk
            )

    def head_logprobs(
        self, states: np.ndarray, targets: np.ndarray, *, temperature: float, chunk: int
    ) -> np.ndarray:
        """Compute only the head's part, from hidden states (N, d)."""
        assert self.network.head is not None
        found = logprobs.head_logprobs(
            self.network.head, mx.array(states), mx.array(targets), temperature, chunk
        )
        return np.array(found)


def open_engine(model: Any, probe: tuple[int, ...] = SMALL_IDS) -> MLXEngine:
    """Open the engine of a model with its adapters attached. probe: see `Network`."""
    return MLXEngine(open_network(model, probe), find_siblings(model))
