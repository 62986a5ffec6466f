"""Bytes of prefill and update where NumPy and C compute the model: counted, not fitted.

`cpu.forward` decides what is kept. Nothing here grows with the square of a length: scores exist for
one part of the queries at a time, and where attention is in C, hardly any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from localrl.engines.cpu.attention import QUERIES, SCORES, attends_in_c
from localrl.engines.cpu.buffers import SPARE
from localrl.engines.cpu.decode import STEP
from localrl.engines.cpu.merged import MOST_BYTES
from localrl.engines.cpu.model import FAMILIES
from localrl.memory.estimate import Workload, paths_at_once
from localrl.memory.sizes import FULL, Sizes
from localrl.records import MemoryPlan

LLAMAS = {"mistral": "llama", "iquestcoder": "llama", "xverse": "llama"}
"""Families that are mlx-lm's Llama under another name."""
SCORE_COPIES = 2.0
"""Arrays as large as the scores at work: weights and their gradients."""
LOGIT_COPIES = 1.0
"""Arrays as large as a chunk's logits: they become their gradient in place."""
FLOAT = 4


@dataclass(frozen=True)
class Extent:
    """What one pass computes."""

    positions: int
    largest: int
    """Positions of the largest level: one is worked on at a time."""
    copied: int
    """Positions of ancestors, for each row that attends to them."""
    paths: int
    length: int
    """Positions of a path that are its own."""
    seen: int
    """The most positions that one attends to."""


@dataclass(frozen=True)
class CPUMemory:
    """See `EngineMemory`."""

    @property
    def name(self) -> Literal["cpu"]:
        """As `model.engine` has it."""
        return "cpu"

    @property
    def counted(self) -> bool:
        """Every array of a pass is, and tests hold it to what MLX has counted."""
        return True

    @property
    def cache_step(self) -> int:
        """Tokens by which caches grow."""
        return STEP

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Its families, in float32, without windows."""
        return fits(sizes, float_bytes=float_bytes, dense=dense)

    def key(self, sizes: Sizes) -> list[Any]:
        """Scores exist in NumPy and hardly in C."""
        return [True, attends_in_c(sizes.head_dim)]

    def kept_bytes(self, sizes: Sizes) -> int:
        """Kept of one position: products gain nothing from more columns."""
        return kept_bytes(sizes)

    def decode_weights(self, sizes: Sizes) -> int:
        """The copy with adapters added in."""
        return merged_bytes(sizes)

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes above the keys and values."""
        positions = prompts * length
        return prefill_bytes(sizes, Extent(positions, positions, 0, prompts, length, length))

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, of scores, and of the head's chunks."""
        paths = paths_at_once(workload, plan)
        prompt, own = plan.max_prompt_tokens, plan.max_completion_tokens
        prompts, paths_own = math.ceil(paths / max(1, plan.group_size)) * prompt, paths * own
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
    """Whether NumPy computes such a model: one of its families, in float32, without windows."""
    return (
        float_bytes == FLOAT
        and LLAMAS.get(sizes.family, sizes.family) in FAMILIES
        and (dense or not sizes.bits)
        and all(window == FULL for window in sizes.windows)
    )


def update_bytes(
    sizes: Sizes, extent: Extent, logits: int, *, recompute: bool
) -> tuple[float, float, float]:
    """What grows with the positions, scores, and logits, of one backward pass.

    logits: bytes of a head chunk's.
    """
    keys = 2 * sizes.kv_heads * sizes.head_dim  # and values
    inside = _inside(sizes)
    kept = (sizes.width + keys) * extent.positions
    # Of one block at a time: every row's copy of its ancestors, and the gradients.
    work = _work(sizes) * extent.largest + 2 * keys * extent.copied
    if recompute:
        work += inside * extent.largest
    else:
        kept += inside * extent.positions
    # Buffers of this work that wait for the next array of their size.
    spare = min(SPARE, FLOAT * work)
    scores = SCORE_COPIES * FLOAT * scores_at_once(sizes, extent)
    head = max(0.0, LOGIT_COPIES * logits - FLOAT * work - scores)
    return FLOAT * (sizes.layers * kept + work) + spare, scores, head


def kept_bytes(sizes: Sizes) -> int:
    """What the way back through all blocks keeps of one position."""
    keys = 2 * sizes.kv_heads * sizes.head_dim  # and values
    return FLOAT * sizes.layers * (sizes.width + keys + _inside(sizes))


def prefill_bytes(sizes: Sizes, extent: Extent) -> float:
    """Above the keys and values, while prompts are prefilled."""
    states = (_inside(sizes) + 3 * sizes.width + sizes.ffn) * extent.positions
    return FLOAT * (states + SCORE_COPIES * scores_at_once(sizes, extent))


def merged_bytes(sizes: Sizes) -> int:
    """The copy of the blocks' matrices that rows are decoded with; none of a larger model."""
    matrices = (m for block in sizes.parts[:-1] for m in block.matrices if m.kind == "linear")
    size = FLOAT * sum(matrix.inputs * matrix.outputs for matrix in matrices)
    return size if size <= MOST_BYTES else 0


def scores_at_once(sizes: Sizes, extent: Extent) -> int:
    """Scores of as many rows as `cpu.attention` takes together; in C a few queries' alone."""
    if attends_in_c(sizes.head_dim):
        return 0
    row = sizes.heads * min(extent.length, QUERIES) * extent.seen
    return row * min(extent.paths, max(1, SCORES // max(row, 1)))


def _inside(sizes: Sizes) -> int:
    """Numbers of a position that a block keeps beside its entering states, keys and values.

    Its product of queries, keys and values is kept as it is, the raw values with it.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return sizes.width + 2 * queries + 2 * keys + 2 * sizes.ffn


def _work(sizes: Sizes) -> int:
    """Numbers of a position on the way back through a block: feed-forward layer or attention."""
    queries = sizes.heads * sizes.head_dim
    return max(4 * sizes.ffn, 5 * queries) + 2 * sizes.width
