"""The log-probabilities of one forward pass over a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from localrl.policy.packing import MicroBatch


@dataclass(eq=False)
class PassLogprobs:
    """Log-probabilities of a batch's trained tokens in one pass.

    A later pass can be compared with them however either is packed into micro-batches.
    """

    nodes: dict[int, np.ndarray] = field(default_factory=dict)
    """(n,) float32 by node of the batch, for the n trained tokens of each."""

    def add(self, micro: MicroBatch, logprobs: np.ndarray) -> None:
        """Add the log-probabilities (N,) of a micro-batch's targets."""
        edges = np.flatnonzero(np.diff(micro.nodes)) + 1
        nodes = micro.nodes[[0, *edges]].tolist()
        self.nodes |= zip(nodes, np.split(logprobs, edges), strict=True)

    def of(self, micro: MicroBatch) -> np.ndarray:
        """Return those (N,) of a micro-batch's targets."""
        return np.concatenate([self.nodes[n] for n in dict.fromkeys(micro.nodes.tolist())])
