"""Bytes of MLX's prefill and update: attention keeps the scores of every block.

The constants are fits to measurements on the CPU backend (`benchmarks/memory.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from localrl.engines.mlx.decode import CACHE_STEP
from localrl.memory.estimate import Workload, paths_at_once
from localrl.memory.sizes import NONE, Sizes
from localrl.records import MemoryPlan

# Numbers kept for the backward pass, by position and block, for each number of the block's width,
# of its queries, keys (values), feed-forward layer and adapters.
WIDTH, QUERIES, KEYS, FEED_FORWARD, RANK = 1.5, 4.0, 3.0, 4.7, 1.0
ADAPTED = 7
"""Linear layers of a block, each with one adapter."""
ANCESTORS = 0.8
"""Copies of the ancestors' keys and values that a path keeps in each block."""
SCORES, ONE_BLOCK_SCORES = 1.0, 1.5
"""Copies of a block's attention scores kept by every block; and more of the block at work."""
ONE_BLOCK = 17.0
"""States of all positions, in widths, that the block at work holds beside what is kept."""
PREFILL_SCORES, PREFILL_STATES = 3.0, 17.0
"""The same while prompts are prefilled, where nothing is kept."""
HEAD_FIRST, HEAD_MORE, HEAD_MOST = 1.2, 0.7, 8.5
"""Arrays as large as a chunk's logits: with one chunk, for each further one, and the most. Chunks
follow each other, but the backend runs ahead of what it computes."""
GATES = {"gemma": 1.3, "qwen3": 1.0, "llama": 0.94, "qwen2": 0.94, "smollm3": 0.94}
"""Families whose blocks keep more or less than Qwen3's: other norms and gates."""
UNKNOWN_GATE = 1.2
"""Of a family that was not measured: rather too much."""


@dataclass(frozen=True)
class MLXMemory:
    """See `EngineMemory`."""

    @property
    def name(self) -> Literal["mlx"]:
        """As `model.engine` has it."""
        return "mlx"

    @property
    def counted(self) -> bool:
        """Its constants are fits."""
        return False

    @property
    def cache_step(self) -> int:
        """Tokens by which caches grow."""
        return CACHE_STEP

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Every model."""
        return True

    def key(self, sizes: Sizes) -> list[Any]:
        """One formula for all."""
        return [False]

    def kept_bytes(self, sizes: Sizes) -> None:
        """No bound: larger batches are faster."""
        return

    def decode_weights(self, sizes: Sizes) -> int:
        """No copy."""
        return 0

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Scores and states of one block at work."""
        scores = PREFILL_SCORES * sizes.heads * length * length
        states = PREFILL_STATES * length * sizes.width
        return workload.float_bytes * prompts * (scores + states)

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and of the head's chunks."""
        paths, rows = paths_at_once(workload, plan), NONE in sizes.windows
        length = plan.max_prompt_tokens + plan.max_completion_tokens
        if rows:  # families that do not share prompts
            positions, pairs = paths * length, paths * length**2
            copied = 0
        else:
            prompt = plan.max_prompt_tokens
            trees = math.ceil(paths / max(1, plan.group_size))
            positions = trees * prompt + paths * plan.max_completion_tokens
            pairs = trees * prompt**2 + paths * plan.max_completion_tokens * length
            copied = paths * prompt * 2 * sizes.kv_heads * sizes.head_dim
        one = _kept(sizes, workload.rank) * positions + ANCESTORS * copied
        states = positions * sizes.width
        attending = sum(window != NONE for window in sizes.windows)
        scores = pairs * sizes.heads
        if plan.grad_checkpoint:
            kept, blocks = sizes.layers * states + 2 * sizes.layers * positions * _keys(sizes), 1
        else:
            kept, blocks = 0.0, sizes.layers
        # The head's logits are gone when a block's gradients come, and with them what that takes.
        linear = kept + blocks * one + ONE_BLOCK * states
        quadratic = (SCORES * min(blocks, attending) + ONE_BLOCK_SCORES) * scores
        targets = paths * plan.max_completion_tokens
        work = ONE_BLOCK * states + ONE_BLOCK_SCORES * scores
        if plan.grad_checkpoint:
            work += one + SCORES * scores
        head = head_bytes(plan.head_chunk, targets, sizes.vocabulary) - workload.float_bytes * work
        size = workload.float_bytes
        return size * linear, size * quadratic, max(0.0, head)


def head_bytes(chunk: int, targets: int, vocabulary: int) -> int:
    """Logits of a head chunk, in float32, and what is made of them."""
    chunk = max(1, min(chunk, targets))
    copies = min(HEAD_MOST, HEAD_FIRST + HEAD_MORE * math.ceil(targets / chunk))
    return round(copies * 4 * chunk * vocabulary)


def _kept(sizes: Sizes, rank: int) -> float:
    """Numbers kept by one block for a position."""
    gate = next((g for family, g in GATES.items() if sizes.family.startswith(family)), UNKNOWN_GATE)
    queries = sizes.heads * sizes.head_dim
    mine = WIDTH * sizes.width + QUERIES * queries + KEYS * _keys(sizes)
    return gate * (mine + FEED_FORWARD * sizes.ffn) + RANK * ADAPTED * rank


def _keys(sizes: Sizes) -> int:
    return sizes.kv_heads * sizes.head_dim
