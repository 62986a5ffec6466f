"""Memory of prefill and update if NumPy and C compute the model: counted, not fitted.

The arrays counted are those that `cpu.forward` keeps. Nothing grows with the square of a length:
scores exist for one block of queries at a time, and with attention in C there are hardly any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from localrl.engines.cpu.attention import QUERIES, SCORES, attends_in_c
from localrl.engines.cpu.buffers import SPARE
from localrl.engines.cpu.decode import STEP
from localrl.engines.cpu.merged import MOST_BYTES
from localrl.engines.cpu.model import FAMILIES
from localrl.memory.estimate import Workload, paths_at_once, prompts_at_once
from localrl.memory.sizes import FULL, Sizes
from localrl.records import MemoryPlan

LLAMAS = {"mistral": "llama", "iquestcoder": "llama", "xverse": "llama"}
"""Families that are mlx-lm's Llama under another name."""
SCORE_COPIES = 2.0
"""Number of arrays as large as the current scores: weights and their gradients."""
LOGIT_COPIES = 1.0
"""Number of arrays as large as a chunk's logits: their gradient is computed in place."""
FLOAT = 4


@dataclass(frozen=True)
class Extent:
    """The size of one pass."""

    positions: int
    largest: int
    """Positions of the largest level: one level is processed at a time."""
    copied: int
    """Positions of ancestors, summed over the rows that attend to them."""
    paths: int
    length: int
    """Positions of a path that it does not share."""
    seen: int
    """Maximum number of positions that one attends to."""


@dataclass(frozen=True)
class CPUMemory:
    """The memory model of the CPU engine: see `EngineMemory`."""

    @property
    def name(self) -> Literal["cpu"]:
        """Name of the engine in `model.engine`."""
        return "cpu"

    @property
    def counted(self) -> bool:
        """True: every array of a pass is counted, and tests compare with MLX's own count."""
        return True

    @property
    def cache_step(self) -> int:
        """Number of tokens by which caches grow."""
        return STEP

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Return True for dense float32 models of its families without sliding windows."""
        return fits(sizes, float_bytes=float_bytes, dense=dense)

    def key(self, sizes: Sizes) -> list[Any]:
        """Key of the formula: NumPy holds scores, C hardly any."""
        return [True, attends_in_c(sizes.head_dim)]

    def kept_bytes(self, sizes: Sizes) -> int:
        """Bytes kept per position; they bound the batch, as more columns gain nothing."""
        return kept_bytes(sizes)

    def decode_weights(self, sizes: Sizes) -> int:
        """Bytes of the copy with adapters merged in."""
        return merged_bytes(sizes)

    def copies(self, sizes: Sizes, workload: Workload) -> int:
        """Return 0: there are none."""
        return 0

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes besides the keys and values."""
        positions = prompts * length
        return prefill_bytes(sizes, Extent(positions, positions, 0, prompts, length, length))

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, bytes of scores, and bytes of the head's chunks."""
        paths = paths_at_once(workload, plan)
        prompt, own = plan.max_prompt_tokens, plan.max_completion_tokens
        prompts, paths_own = prompts_at_once(workload, plan) * prompt, paths * own
        extent = Extent(
            prompts + paths_own,
            max(prompts, paths_own),
            paths * prompt,
            paths,
            own,
            prompt + own,
        )
        logits = 4 * max(1, min(plan.head_chunk, paths * own)) * sizes.vocabulary
        return update_bytes(sizes, extent, logits, recompute=plan.grad_checkpoint)


def fits(sizes: Sizes, *, float_bytes: int, dense: bool) -> bool:
    """Return True if NumPy can compute such a model: a known family, float32, no windows."""
    return (
        float_bytes == FLOAT
        and LLAMAS.get(sizes.family, sizes.family) in FAMILIES
        and (dense or not sizes.bits)
        and all(window == FULL for window in sizes.windows)
    )


def update_bytes(
    sizes: Sizes, extent: Extent, logits: int, *, recompute: bool
) -> tuple[float, float, float]:
    """Bytes that grow with positions, of scores, and of logits, in one backward pass.

    logits: bytes of a head chunk's logits.
    """
    keys = 2 * sizes.kv_heads * sizes.head_dim  # and values
    inside = _inside(sizes)
    kept = (sizes.width + keys) * extent.positions
    # For one block at a time: every row's copy of its ancestors, and the gradients.
    work = _work(sizes) * extent.largest + 2 * keys * extent.copied
    if recompute:
        work += inside * extent.largest
    else:
        kept += inside * extent.positions
    # Free buffers of this work, kept for the next array of their size.
    spare = min(SPARE, FLOAT * work)
    scores = SCORE_COPIES * FLOAT * scores_at_once(sizes, extent)
    head = max(0.0, LOGIT_COPIES * logits - FLOAT * work - scores)
    return FLOAT * (sizes.layers * kept + work) + spare, scores, head


def kept_bytes(sizes: Sizes) -> int:
    """Bytes kept per position for the backward pass through all blocks."""
    keys = 2 * sizes.kv_heads * sizes.head_dim  # and values
    return FLOAT * sizes.layers * (sizes.width + keys + _inside(sizes))


def prefill_bytes(sizes: Sizes, extent: Extent) -> float:
    """Bytes besides the keys and values while prompts are prefilled."""
    states = (_inside(sizes) + 3 * sizes.width + sizes.ffn) * extent.positions
    return FLOAT * (states + SCORE_COPIES * scores_at_once(sizes, extent))


def merged_bytes(sizes: Sizes) -> int:
    """Bytes of the merged copy of the blocks' matrices for decoding; 0 for a larger model."""
    matrices = (m for block in sizes.parts[:-1] for m in block.matrices if m.kind == "linear")
    size = FLOAT * sum(matrix.inputs * matrix.outputs for matrix in matrices)
    return size if size <= MOST_BYTES else 0


def scores_at_once(sizes: Sizes, extent: Extent) -> int:
    """Number of scores of the rows `cpu.attention` computes together; in C a negligible few."""
    if attends_in_c(sizes.head_dim):
        return 0
    row = sizes.heads * min(extent.length, QUERIES) * extent.seen
    return row * min(extent.paths, max(1, SCORES // max(row, 1)))


def _inside(sizes: Sizes) -> int:
    """Numbers per position that a block keeps besides its input, keys and values.

    The fused product of queries, keys and values is kept whole, including the raw values.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return sizes.width + 2 * queries + 2 * keys + 2 * sizes.ffn


def _work(sizes: Sizes) -> int:
    """Numbers per position in the backward pass of a block: feed-forward layer or attention."""
    queries = sizes.heads * sizes.head_dim
    return max(4 * sizes.ffn, 5 * queries) + 2 * sizes.width
