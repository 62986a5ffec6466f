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
from localrl.memory.layers import BlockShape
from localrl.memory.sizes import FULL, NONE, Sizes, lora_parameters
from localrl.records import MemoryPlan

# Numbers kept for the backward pass per position and block: coefficients of the block's width, its
# queries, keys (and values), feed-forward width and adapter ranks.
WIDTH, QUERIES, KEYS, FEED_FORWARD, RANK = 1.5, 4.0, 3.0, 4.7, 1.0
MIXERS = {"self_attn": 3.0, "conv": 2.5, "linear_attn": 4.0, "mamba": 2.4}
"""Numbers kept for each number of attention's gate, or that a recurrent layer or a convolution
computes from a token."""
ANCESTORS = 0.8
"""Number of copies of the ancestors' keys and values that a path keeps in each block."""
SCORES, ONE_BLOCK_SCORES = 1.0, 1.5
"""Copies of attention scores kept by every block, and further copies in the current block."""
TILE, TILED_SCORES, TILED_HEADS = 1024, 3.0, (64, 72, 80, 96, 128, 192, 256)
"""Positions along each side of a tile of the recomputed scores, arrays of that size for all heads,
and head sizes with such a gradient. Read in the wheel of mlx-metal 0.32.4, never measured."""
CHUNK_STATES, ROW_STATES = 2.0, 1.25
"""Copies of a recurrent layer's state for each chunk of tokens, and for each row of a level."""
PIECE, PIECE_SCORES, TOKEN_STATES = 256, 2.6, 1.25
"""Tokens that Mamba 2 computes like attention at a time, copies of their scores kept by every
layer, and copies of a state for each token of completions in the current one."""
RECOMPUTED = 1.5
"""Blocks that exist at once where each is computed again for the backward pass."""
ONE_BLOCK = 17.0
"""Further numbers per position in the current block, in multiples of the width."""
PREFILL_SCORES, PREFILL_STATES = 3.0, 17.0
"""Copies of scores and multiples of the width in prefill, where nothing is kept."""
PREFILL_PIECES, PREFILL_MIXED = 8.0, 4.0
"""Copies of the scores within Mamba 2's pieces there, and of what a recurrent layer computes."""
HEAD_FIRST, HEAD_MORE, HEAD_MOST = 1.2, 0.7, 8.5
"""Number of arrays as large as a chunk's logits: base, per chunk, and maximum. Chunks run one after
another, but the backend allocates ahead of the computation."""
GATES = {
    "gemma4": 1.75,
    "gemma": 1.3,
    "qwen3": 1.0,
    "lfm2": 1.0,
    "granitemoehybrid": 1.0,
    "llama": 0.94,
    "qwen2": 0.94,
    "smollm3": 0.94,
}
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
        pieces = PREFILL_PIECES * sizes.piece_heads * length * min(length, PIECE)
        mixed = PREFILL_MIXED * max((block.gated for block in sizes.blocks), default=0)
        states = length * (PREFILL_STATES * sizes.width + mixed)
        return workload.float_bytes * prompts * (max(scores, pieces) + states)

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and with the head's chunks."""
        paths, prompt = paths_at_once(workload, plan), plan.max_prompt_tokens
        trees = math.ceil(paths / max(1, plan.group_size))
        positions = trees * prompt + paths * plan.max_completion_tokens
        blocks = [
            _kept(sizes, block, workload.rank) * positions + ANCESTORS * paths * prompt * cached
            for block, cached in zip(sizes.blocks, sizes.cached, strict=True)
        ]
        states = positions * sizes.width
        one, kept = max(blocks), float(sum(blocks))
        attending, at_once = sum(window != NONE for window in sizes.windows), sizes.layers
        if plan.grad_checkpoint:
            kept = sizes.layers * states + positions * sum(sizes.cached) + RECOMPUTED * one
            at_once = 1
        # The head's logits are freed before the blocks' gradients exist, so they can overlap.
        linear = kept + ONE_BLOCK * states
        scores, one_block = self._scores(sizes, plan, paths, trees)
        kept_scores = SCORES * min(at_once, attending) * scores
        targets = paths * plan.max_completion_tokens
        work = ONE_BLOCK * states + one_block
        if plan.grad_checkpoint:
            work += one + kept_scores
        head = head_bytes(plan.head_chunk, targets, sizes.vocabulary) - workload.float_bytes * work
        size = workload.float_bytes
        recurrent = recurrent_bytes(sizes, plan, paths, trees)
        return (
            size * linear + recurrent[0],
            size * (kept_scores + one_block) + recurrent[1],
            max(0.0, head),
        )

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


def recurrent_bytes(sizes: Sizes, plan: MemoryPlan, paths: int, trees: int) -> tuple[float, float]:
    """Bytes of recurrent layers beside what a token keeps, linear and quadratic in lengths.

    A gated delta net keeps its float32 state once for each chunk of tokens. Mamba 2 computes like
    attention within pieces of `PIECE` tokens, and its gradient holds, in one block, a state for
    each token of a level that goes on from other states.
    """
    layers = sum(block.mixer in ("linear_attn", "mamba") for block in sizes.blocks)
    if not layers or not sizes.state_numbers:
        return 0.0, 0.0
    prompt, tokens = plan.max_prompt_tokens, plan.max_completion_tokens
    at_once = 1 if plan.grad_checkpoint else layers
    state = sizes.state_numbers / layers
    ends = ROW_STATES * layers * (paths + trees)
    if not sizes.piece_heads:
        chunks = CHUNK_STATES * (trees * prompt + paths * tokens) / CHUNK
        return 4 * state * (at_once * chunks + ends), 0.0
    scores = trees * prompt * min(prompt, PIECE) + paths * tokens * min(tokens, PIECE)
    scores *= sizes.piece_heads
    quadratic = 4 * scores * PIECE_SCORES * at_once
    return 4 * state * (ends + TOKEN_STATES * paths * tokens), quadratic


def head_bytes(chunk: int, targets: int, vocabulary: int) -> int:
    """Bytes of a head chunk's float32 logits and of the arrays computed from them."""
    chunk = max(1, min(chunk, targets))
    copies = min(HEAD_MOST, HEAD_FIRST + HEAD_MORE * math.ceil(targets / chunk))
    return round(copies * 4 * chunk * vocabulary)


def _kept(sizes: Sizes, block: BlockShape, rank: int) -> float:
    """Numbers kept by one block per position."""
    gate = next((g for family, g in GATES.items() if sizes.family.startswith(family)), UNKNOWN_GATE)
    mixing = QUERIES * block.queries + KEYS * block.cached / 2 + MIXERS[block.mixer] * block.gated
    adapted = sum(matrix.kind == "linear" for matrix in block.matrices)
    mine = WIDTH * sizes.width + mixing + FEED_FORWARD * block.inner
    return gate * mine + RANK * adapted * rank
