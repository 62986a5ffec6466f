"""The engine that computes in NumPy and C on a CPU: implements `policy.engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localrl.backend import mx
from localrl.engines.cpu import decode, kernel_choice, logprobs
from localrl.engines.cpu.kernel_choice import Choice
from localrl.engines.cpu.model import CPUModel
from localrl.policy.packing import MicroBatch
from localrl.policy.selfcheck import Check


@dataclass(frozen=True)
class CPUEngine:
    """Dense float32 models of the families that `CPUModel` reads: see `Engine`."""

    model: CPUModel

    @property
    def name(self) -> Literal["cpu"]:
        """Name of the engine in `model.engine`."""
        return "cpu"

    @property
    def shares_prompts(self) -> bool:
        """True: rows may share a prompt."""
        return True

    @property
    def copied_positions(self) -> int:
        """Return 0."""
        return 0

    @property
    def looks_ahead(self) -> bool:
        """False: a step is computed when it is called."""
        return False

    @property
    def splits_head(self) -> bool:
        """True: body and head are separate."""
        return True

    @property
    def packs_forests(self) -> bool:
        """True: forests and rows use the same code."""
        return True

    @property
    def kernels(self) -> Choice:
        """The C kernels in use."""
        return kernel_choice.current()

    def use_kernels(self, kernels: Choice) -> None:
        """Use the kernels of an earlier run.

        Raises: ConfigError if this processor cannot run them.
        """
        if (kernels.bytes, kernels.columns) != (self.kernels.bytes, self.kernels.columns):
            kernel_choice.use(kernels)

    def check_recompute(self) -> Check:
        """Return an error of 0: rows and recomputed blocks use the same code."""
        return Check("recomputed_gradient", 0.0, 0.0, 0.0)

    def decode_numbers(self) -> int:
        """Number of weights in the head and the matrices of all blocks."""
        weights = self.model.read()
        layers = [weights.head]
        for block in weights.blocks:
            layers += [block.queries_keys_values, block.output, block.gate_up, block.down]
        return sum(layer.weight.size for layer in layers)

    def prefill(self, tokens: np.ndarray, lengths: Sequence[int]) -> decode.CPUPrefilled:
        """Run right-padded prompts (P, L)."""
        return decode.prefill(self.model, tokens, np.array(lengths, np.int32))

    def token_logprobs(
        self,
        micro: MicroBatch,
        *,
        temperature: float,
        head_chunk: int,
        gradient: bool = False,
        recompute: bool = False,
    ) -> mx.array:
        """Float32 log-probabilities (N,) as a differentiable MLX function."""
        return logprobs.token_logprobs(
            self.model,
            micro,
            temperature=temperature,
            head_chunk=head_chunk,
            gradient=gradient,
            recompute=recompute,
        )

    def head_logprobs(
        self, states: np.ndarray, targets: np.ndarray, *, temperature: float, chunk: int
    ) -> np.ndarray:
        """Compute only the head's part, from hidden states (N, d)."""
        head = logprobs.ChunkedHead(self.model.read(), targets, temperature, chunk)
        return head.logprobs(np.ascontiguousarray(states.T))
