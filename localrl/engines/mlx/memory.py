"""Memory of MLX's prefill and update: attention keeps the scores of every block.

What blocks keep for the backward pass is counted, array by array; what exists besides at the peak
is fitted to measurements on the CPU backend (`benchmarks/memory.md`). From mlx 0.32.4 on, the
gradient of causal attention on Metal recomputes the scores, a tile at a time. That is for
`mask="causal"` alone, which a forest's prompts pass; its completions pass arrays and keep all
scores, and so does the CPU with any mask.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from localrl.engines.mlx import gated_delta, mamba
from localrl.engines.mlx.decode import CACHE_STEP
from localrl.memory.estimate import Workload, paths_at_once, prompts_at_once
from localrl.memory.families import find_family
from localrl.memory.layers import BlockShape
from localrl.memory.sizes import FULL, NONE, Sizes, lora_parameters
from localrl.records import MemoryPlan

# Numbers that a block keeps per position for the backward pass, counted in the graph: each layer's
# input that its gradient needs, each array once.
STREAM = 2
"""Hidden states before attention and before the feed-forward layer; each norm adds one array."""
ATTENDED = 2
"""Arrays as wide as the queries, and as keys and values: rotated queries and the output, keys and
values with the ancestors' before them. A norm of heads keeps its input too."""
SWIGLU, GEGLU = 4, 7
"""Arrays as wide as the feed-forward layer: gate, up, their product, and the activation's steps."""
EXPERTS = 2
"""Arrays as wide as the model that a mixture keeps besides: outputs of experts before weighting."""
PER_LAYER_STREAM, PER_LAYER = 2, 7
"""Arrays of Gemma 4's embeddings per layer, as wide as the model and as wide as they are."""
MIXERS = {"self_attn": 3.0, "conv": 5 / 3, "linear_attn": 4.0, "mamba": 4.8}
"""Numbers kept for each number of attention's gate, or of what the first layer of a convolution or
a recurrent layer computes."""
ANCESTORS = 1
"""Number of copies of the ancestors' keys and values that a path keeps in each block."""
SCORES, ONE_BLOCK_SCORES = 1.0, 1.5
"""Copies of attention scores kept by every block, and further copies in the current block."""
TILE, TILED_SCORES, TILED_HEADS = 1024, 3.0, (64, 72, 80, 96, 128, 192, 256)
"""Positions along each side of a tile of the recomputed scores, arrays of that size for all heads,
and head sizes with such a gradient. Read in the wheel of mlx-metal 0.32.4, never measured."""
CHUNK_STATES, ROW_STATES = 2.0, 1.25
"""Copies of a recurrent layer's state for each chunk of tokens, and for each row of a level."""
CHUNKS = {"linear_attn": gated_delta.CHUNK, "mamba": mamba.CHUNK}
"""Tokens per chunk of recurrent layers."""
RECOMPUTED, RECOMPUTED_SCORES = 1.25, 3.0
"""Blocks, and copies of scores, that exist at once where blocks are computed again."""
ONE_BLOCK = 6.0
"""Further numbers per position in the current block, in multiples of the feed-forward width."""
PREFILL_SCORES, PREFILL_STATES, PREFILL_MIXED = 3.0, 17.0, 4.0
"""Copies of scores, multiples of the width, and copies of what a recurrent layer computes, in
prefill, where nothing is kept."""
HEAD_FIRST, HEAD_MORE, HEAD_MOST = 1.2, 0.7, 8.5
"""Number of arrays as large as a chunk's logits: base, per chunk, and maximum. Chunks run one after
another, but the backend allocates ahead of the computation."""
HEAD_CAPPED = 2.8
"""The same besides where logits are capped, whose steps are kept for the head's gradient."""
OWN_HEAD = ("gemma2", "gemma4", "granite")
"""Families whose own code computes the logits, in the activations' format."""
CAPPED, GELU = ("gemma2", "gemma4"), "gemma"
"""Families that cap their logits, and those with GELU instead of SiLU."""


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
        if sizes.bits and workload.float_bytes == 2 and not sizes.family.startswith(OWN_HEAD):
            scales = 2 * 4 * sizes.vocabulary * sizes.width / sizes.quant_group_size
        return round(workload.float_bytes * numbers + scales)

    def prefill(self, sizes: Sizes, workload: Workload, *, prompts: int, length: int) -> float:
        """Bytes of scores and hidden states of the current block."""
        scores = PREFILL_SCORES * sizes.heads * length * length
        mixed = PREFILL_MIXED * max((block.gated for block in sizes.blocks), default=0)
        states = length * (PREFILL_STATES * sizes.width + mixed)
        return workload.float_bytes * prompts * (scores + states)

    def update(
        self, sizes: Sizes, workload: Workload, plan: MemoryPlan
    ) -> tuple[float, float, float]:
        """Bytes that grow with positions, with their square, and with the head's chunks."""
        paths, prompt = paths_at_once(workload, plan), plan.max_prompt_tokens
        trees = prompts_at_once(workload, plan)
        positions = trees * prompt + paths * plan.max_completion_tokens
        blocks = [
            _kept(sizes, block, workload.rank) * positions + ANCESTORS * paths * prompt * cached
            for block, cached in zip(sizes.blocks, sizes.cached, strict=True)
        ]
        work = ONE_BLOCK * positions * max(block.inner for block in sizes.blocks)
        scores, one_block = self._scores(sizes, plan, paths, trees)
        if plan.grad_checkpoint:
            one, one_block = _largest(sizes, blocks, scores)
            inputs = positions * (sizes.layers * sizes.width + sum(sizes.cached))
            kept, kept_scores, again = inputs + one, 0.0, one
        else:
            attending = sum(window != NONE for window in sizes.windows)
            kept, kept_scores, again = sum(blocks), SCORES * attending * scores, 0.0
        # The head's logits are freed before the blocks' gradients exist, so they can overlap.
        size, overlap = workload.float_bytes, work + one_block + again
        targets = paths * plan.max_completion_tokens
        capped = sizes.family.startswith(CAPPED)
        head = head_bytes(plan.head_chunk, targets, sizes.vocabulary, capped=capped)
        return (
            size * (kept + work) + recurrent_bytes(sizes, plan, paths, trees),
            size * (kept_scores + one_block),
            max(0.0, head - size * overlap),
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


def recurrent_bytes(sizes: Sizes, plan: MemoryPlan, paths: int, trees: int) -> float:
    """Bytes of recurrent layers' float32 states: one for each chunk of tokens, and ends of rows."""
    layers = sum(block.mixer in CHUNKS for block in sizes.blocks)
    if not layers or not sizes.state_numbers:
        return 0.0
    size = next(CHUNKS[block.mixer] for block in sizes.blocks if block.mixer in CHUNKS)
    prompt, tokens = plan.max_prompt_tokens, plan.max_completion_tokens
    at_once = 1 if plan.grad_checkpoint else layers
    chunks = (trees * prompt + paths * tokens) / size
    ends = ROW_STATES * layers * (paths + trees)
    return 4 * sizes.state_numbers / layers * (at_once * CHUNK_STATES * chunks + ends)


def head_bytes(chunk: int, targets: int, vocabulary: int, *, capped: bool = False) -> int:
    """Bytes of a head chunk's float32 logits and of the arrays computed from them."""
    chunk = max(1, min(chunk, targets))
    copies = min(HEAD_MOST, HEAD_FIRST + HEAD_MORE * math.ceil(targets / chunk))
    return round((copies + HEAD_CAPPED * capped) * 4 * chunk * vocabulary)


def _largest(sizes: Sizes, blocks: list[float], scores: float) -> tuple[float, float]:
    """Numbers that exist of the largest recomputed block, and of its scores."""
    each = zip(blocks, sizes.windows, strict=True)
    return max(
        (
            (RECOMPUTED * kept, RECOMPUTED_SCORES * scores * (window != NONE))
            for kept, window in each
        ),
        key=sum,
    )


def _kept(sizes: Sizes, block: BlockShape, rank: int) -> float:
    """Numbers kept by one block per position."""
    family = find_family({"model_type": sizes.family})
    gelu = not sizes.known or sizes.family.startswith(GELU)
    norms = bool(family.head_norms) or not sizes.known
    keys = ATTENDED + norms + family.per_layer
    adapted = [matrix for matrix in block.matrices if matrix.kind == "linear"]
    each = sum(m.outputs for m in adapted if m.path == "per_layer_input_gate")
    mixture = any(matrix.kind == "experts" for matrix in block.matrices)
    stream = STREAM + family.norms + EXPERTS * mixture + PER_LAYER_STREAM * bool(each)
    return (
        stream * sizes.width
        + (ATTENDED + norms) * block.queries
        + keys * block.cached / 2
        + MIXERS[block.mixer] * block.gated
        + (GEGLU if gelu else SWIGLU) * block.inner
        + PER_LAYER * each
        + rank * len(adapted)
    )
