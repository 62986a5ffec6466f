"""Memory of MLX's prefill and update: attention keeps the scores of every block.

The constants are fitted to measurements on the CPU backend (`benchmarks/memory.md`). From mlx
0.32.4 on, the gradient of causal attention on Metal recomputes the scores, a tile at a time. That
is for `mask="causal"` alone, which a forest's prompts pass; its completions pass arrays and keep
all scores, and so does the CPU with any mask.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from localrl.engines.mlx.decode import CACHE_STEP
from localrl.engines.mlx.gated_delta import CHUNK
from localrl.memory.estimate import Workload, paths_at_once
from localrl.memory.sizes import FULL, NONE, Sizes, lora_parameters
from localrl.records import MemoryPlan

# Numbers kept for the backward pass per position and block: coefficients of the block's width, its
# queries, keys (and values), feed-forward width and adapter ranks.
WIDTH, QUERIES, KEYS, FEED_FORWARD, RANK = 1.5, 4.0, 3.0, 4.7, 1.0
ADAPTED = 7
"""Number of linear layers in a block, each with one adapter."""
ANCESTORS = 0.8
"""Number of copies of the ancestors' keys and values that a path keeps in each block."""
SCORES, ONE_BLOCK_SCORES = 1.0, 1.5
"""Copies of attention scores kept by every block, and further copies in the current block."""
TILE, TILED_SCORES, TILED_HEADS = 1024, 3.0, (64, 72, 80, 96, 128, 192, 256)
"""Positions along each side of a tile of the recomputed scores, arrays of that size for all heads,
and head sizes with such a gradient. Read in the wheel of mlx-metal 0.32.4, never measured."""
CHUNK_STATES, ROW_STATES = 2.0, 3.0
"""Copies of a layer's state for each chunk of tokens, and for each row of a level."""
ONE_BLOCK = 17.0
"""Further numbers per position in the current block, in multiples of the width."""
PREFILL_SCORES, PREFILL_STATES = 3.0, 17.0
"""Copies of scores and multiples of the width in prefill, where nothing is kept."""
HEAD_FIRST, HEAD_MORE, HEAD_MOST = 1.2, 0.7, 8.5
"""Number of arrays as large as a chunk's logits: base, per chunk, and maximum. Chunks run one after
another, but the backend allocates ahead of the computation."""
GATES = {"gemma": 1.3, "qwen3": 1.0, "llama": 0.94, "qwen2": 0.94, "smollm3": 0.94}
"""Memory of each family's blocks relative to Qwen3's: norms and gates differ."""
UNKNOWN_GATE = 1.2
"""The same for a family that was not measured: a conservative value."""


@dataclass(frozen=True)
class MLXMemory:
    """The memory model of the MLX engine: see `EngineMemory`."""

    tiled: bool = False
    """True if the gradient of causal attention recomputes its scores: see `recomputes_scores`."""

    @property
    def name(self) -> Literal["mlx"]:
        """Name of the engine in `model.engine`."""
        return "mlx"

    @property
    def counted(self) -> bool:
        """False: its constants are fitted."""
        return False

    @property
    def cache_step(self) -> int:
        """Number of tokens by which caches grow."""
        return CACHE_STEP

    def computes(self, sizes: Sizes, float_bytes: int, *, dense: bool) -> bool:
        """Return True: MLX computes every model."""
        return True

    def key(self, sizes: Sizes) -> list[Any]:
        """Key of the formula: with all scores kept, or without."""
        return [False, *(["tiled"] if self._tiles(sizes) else [])]

    def kept_bytes(self, sizes: Sizes) -> None:
        """None: no bound, since larger batches are faster."""
        return

    def decode_weights(self, sizes: Sizes) -> int:
        """Return 0: no copy is made."""
        return 0

    def copies(self, sizes: Sizes, workload: Workload) -> int:
        """Bytes of adapters in the activations' format, and of a 16-bit head's float32 scales."""
        numbers = lora_parameters(sizes, workload.rank, workload.lora_layers, workload.lora_keys)
        scales = 0.0
        if sizes.bits and workload.float_bytes == 2:
            scales = 2 * 4 * sizes.vocabulary * sizes.width / sizes.quant_group_size
        return round(workload.float_bytes * numbers + scales)

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes of scores and hidden states of the current block."""
        scores = PREFILL_SCORES * sizes.heads * length * length
        states = PREFILL_STATES * length * sizes.width
        return workload.float_bytes * prompts * (scores + states)

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and with the head's chunks."""
        paths, prompt = paths_at_once(workload, plan), plan.max_prompt_tokens
        trees = math.ceil(paths / max(1, plan.group_size))
        positions = trees * prompt + paths * plan.max_completion_tokens
        copied = paths * prompt * 2 * sizes.kv_heads * sizes.head_dim
        one = _kept(sizes, workload.rank) * positions + ANCESTORS * copied
        states = positions * sizes.width
        attending = sum(window != NONE for window in sizes.windows)
        if plan.grad_checkpoint:
            kept, blocks = sizes.layers * states + 2 * sizes.layers * positions * _keys(sizes), 1
        else:
            kept, blocks = 0.0, sizes.layers
        # The head's logits are freed before the blocks' gradients exist, so they can overlap.
        linear = kept + blocks * one + ONE_BLOCK * states
        scores, one_block = self._scores(sizes, plan, paths, trees)
        kept_scores = SCORES * min(blocks, attending) * scores
        targets = paths * plan.max_completion_tokens
        work = ONE_BLOCK * states + one_block
        if plan.grad_checkpoint:
            work += one + kept_scores
        head = head_bytes(plan.head_chunk, targets, sizes.vocabulary) - workload.float_bytes * work
        size = workload.float_bytes
        linear = size * linear + recurrent_bytes(sizes, positions, paths + trees)
        return linear, size * (kept_scores + one_block), max(0.0, head)

    def _scores(
        self, sizes: Sizes, plan: MemoryPlan, paths: int, trees: int
    ) -> tuple[float, float]:
        """Numbers of scores that every block keeps, and that the current block holds besides."""
        prompt, tokens = plan.max_prompt_tokens, plan.max_completion_tokens
        after = paths * tokens * (prompt + tokens) * sizes.heads
        before = trees * prompt**2 * sizes.heads
        if not self._tiles(sizes):
            return after + before, ONE_BLOCK_SCORES * (after + before)
        tile = TILED_SCORES * trees * sizes.heads * min(prompt, TILE) ** 2
        return after, max(ONE_BLOCK_SCORES * after, tile)

    def _tiles(self, sizes: Sizes) -> bool:
        """Return True if all attention layers recompute the scores of prompts."""
        full = all(window in (FULL, NONE) for window in sizes.windows)
        return self.tiled and full and sizes.head_dim in TILED_HEADS


def recomputes_scores(device: str, mlx: str | None = None) -> bool:
    """Return True if MLX's gradient of causal attention recomputes its scores on this device.

    mlx: its version; None: the installed one.
    """
    numbers = [int(part) for part in re.findall(r"\d+", mlx or version("mlx"))[:3]]
    switched_off = os.environ.get("MLX_SDPA_VJP_FALLBACK", "0") != "0"
    return device == "metal" and numbers >= [0, 32, 4] and not switched_off


def recurrent_bytes(sizes: Sizes, positions: int, rows: int) -> float:
    """Bytes of recurrent states in float32: of each chunk, and of each row's beginning and end."""
    return 4 * sizes.state_numbers * (CHUNK_STATES * positions / CHUNK + ROW_STATES * rows)


def head_bytes(chunk: int, targets: int, vocabulary: int) -> int:
    """Bytes of a head chunk's float32 logits and of the arrays computed from them."""
    chunk = max(1, min(chunk, targets))
    copies = min(HEAD_MOST, HEAD_FIRST + HEAD_MORE * math.ceil(targets / chunk))
    return round(copies * 4 * chunk * vocabulary)


def _kept(sizes: Sizes, rank: int) -> float:
    """Numbers kept by one block per position."""
    gate = next((g for family, g in GATES.items() if sizes.family.startswith(family)), UNKNOWN_GATE)
    queries = sizes.heads * sizes.head_dim
    mine = WIDTH * sizes.width + QUERIES * queries + KEYS * _keys(sizes)
    return gate * (mine + FEED_FORWARD * sizes.ffn) + RANK * ADAPTED * rank


def _keys(sizes: Sizes) -> int:
    return sizes.kv_heads * sizes.head_dim
