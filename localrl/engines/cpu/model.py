"""A model's weights as NumPy arrays: views of MLX's own memory.

This supports families whose blocks are attention and a gated feed-forward layer, with
root-mean-square norms and rope; others stay with MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from localrl.backend import mx, nn
from localrl.engines.cpu.kernel_choice import KernelSizes, choose
from localrl.engines.cpu.math import AdapterSlice, FusedLinear, Norm, RopeTables, apply_rope
from localrl.engines.cpu.merged import Merging
from localrl.engines.cpu.weights import Block, Weights
from localrl.policy.lora import LoRALinear

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
"""Modules of mlx-lm whose models NumPy computes identically."""
ROPES = ("RoPE", "Llama3RoPE", "YarnRoPE", "SuScaledRoPE", "NoPE")
"""Rope layers whose angles depend only on the position, not on the length of the text."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
"""Layers of a block, in the order of its `FusedLinear`s."""
PROBED = 16
"""Number of positions at which rope layers are compared."""


class UnfitError(Exception):
    """Raised for a model that this engine cannot compute."""


class Rope:
    """The rope of a layer as tables: columns x * cosines + x[pair_index] * sines.

    The tables are read from the layer itself, whatever its scaling, as it is linear in its input.
    """

    def __init__(self, layer: Any, size: int) -> None:
        """size: head size. Raises: UnfitError for a layer that is not known to be linear."""
        if type(layer).__name__ not in ROPES:
            raise UnfitError(f"unsupported rope layer {type(layer).__name__}")
        self._layer = layer
        dims = getattr(layer, "dims", getattr(layer, "dim", size))
        places = np.arange(size)
        if getattr(layer, "traditional", False):
            first, pair_index = places % 2 == 0, places ^ 1
        else:
            first, pair_index = places < dims // 2, (places + dims // 2) % dims
        self._first = first | (places >= dims)
        self.pair_index = np.where(places < dims, pair_index, places)
        self._tables = self._read(PROBED)

    def tables(self, positions: np.ndarray) -> RopeTables:
        """Look up cosines and sines (head_dim, B) at these positions (B,)."""
        most = int(positions.max()) + 1
        if most > self._tables[0].shape[1]:
            self._tables = self._read(1 << (most - 1).bit_length())
        cosines, sines = self._tables
        return cosines.take(positions, axis=1), sines.take(positions, axis=1)

    def rotate(self, x: np.ndarray, tables: RopeTables) -> np.ndarray:
        """Apply rope to columns (heads, head_dim, B)."""
        return apply_rope(x, self.pair_index, tables)

    def back(self, grad: np.ndarray, tables: RopeTables) -> np.ndarray:
        """Gradient w.r.t. the input of `rotate`, given `grad` w.r.t. its output."""
        cosines, sines = tables
        return apply_rope(grad, self.pair_index, (cosines, sines.take(self.pair_index, axis=0)))

    def same_rotation(self, other: Rope) -> bool:
        """Return True if the other applies the same rotation."""
        mine, others = (np.stack([t[:, :PROBED] for t in r._tables]) for r in (self, other))
        return np.array_equal(mine, others) and np.array_equal(self.pair_index, other.pair_index)

    def _read(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the tables, from inputs with ones at the first, then the second of each pair."""
        shape = (1, 1, length, len(self._first))
        one, two = (
            np.array(self._layer(mx.broadcast_to(mx.array(half.astype(np.float32)), shape)))[0, 0]
            for half in (self._first, ~self._first)
        )
        cosines, sines = np.where(self._first, one, two), np.where(self._first, two, one)
        return np.ascontiguousarray(cosines.T), np.ascontiguousarray(sines.T)


class CPUModel:
    """A model of one of the families above; its weights are read again for every batch of rows."""

    def __init__(self, model: Any) -> None:
        """Prepare a model of mlx-lm.

        Raises: UnfitError for other families, for windows, and for weights that are not dense
        float32.
        """
        if type(model).__module__.rpartition(".")[2] not in FAMILIES:
            raise UnfitError("unsupported family")
        if any(getattr(block, "use_sliding", False) for block in model.layers):
            raise UnfitError("sliding windows")
        self._model = model
        first = model.layers[0].self_attn
        self._read_ends()
        # Raises UnfitError before anything is moved. Until then a block is a copy: one at a time.
        for layer in model.layers:
            _block(layer)
        for layer in model.layers:
            lay_beside(*(layer.self_attn[name] for name in ATTENTION[:3]))
            lay_beside(*(layer.mlp[name] for name in FEED_FORWARD[:2]))
        block = _block(model.layers[0])
        self.scale: float = first.scale
        self.heads, self.kv_heads = first.n_heads, first.n_kv_heads
        self.head_dim = block.output.weight.shape[1] // self.heads
        self.choice = choose(
            KernelSizes(
                rows=len(block.gate_up.weight),
                inputs=block.gate_up.weight.shape[1],
                ffn=block.down.weight.shape[1],
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
            )
        )
        self.ropes = self._read_ropes()
        self._merging = Merging()

    def adapters(self) -> list[LoRALinear]:
        """Return the adapted layers, in the order of each block's `FusedLinear`s."""
        return [
            module
            for block in self._model.layers
            for module in (
                *(getattr(block.self_attn, name) for name in ATTENTION),
                *(getattr(block.mlp, name) for name in FEED_FORWARD),
            )
            if isinstance(module, LoRALinear) and module.scale != 0
        ]

    def read(self) -> Weights:
        """Read the current weights; adapters of scale 0 are left out."""
        embedding, norm, head = self._read_ends()
        return Weights(embedding, tuple(_block(block) for block in self._model.layers), norm, head)

    def for_decoding(self, weights: Weights) -> Weights:
        """Convert weights that were just read to the form that decodes a few rows fastest."""
        layers = self.adapters()
        made_of = [array for layer in layers for array in (layer.lora_a, layer.lora_b)]
        return self._merging.of(weights, made_of)

    def _read_ends(self) -> tuple[np.ndarray, Norm, FusedLinear]:
        """The embedding, the last norm and the head."""
        body = self._model.model
        embedding = _array(body.embed_tokens.weight)
        tied = "lm_head" not in self._model
        head = FusedLinear(embedding, (slice(0, len(embedding)),)) if tied else None
        return embedding, _norm(body.norm), head or _linears(self._model.lm_head)

    def _read_ropes(self) -> list[Rope]:
        """The rope of each block; blocks with the same rotation share one."""
        found: list[Rope] = []
        for block in self._model.layers:
            mine = Rope(block.self_attn.rope, self.head_dim)
            found.append(next((other for other in found if other.same_rotation(mine)), mine))
        return found


def _block(block: Any) -> Block:
    attention, feed_forward = block.self_attn, block.mlp
    return Block(
        _norm(block.input_layernorm),
        _linears(attention.q_proj, attention.k_proj, attention.v_proj),
        _norm(attention.q_norm) if "q_norm" in attention else None,
        _norm(attention.k_norm) if "k_norm" in attention else None,
        _linears(attention.o_proj),
        _norm(block.post_attention_layernorm),
        _linears(feed_forward.gate_proj, feed_forward.up_proj),
        _linears(feed_forward.down_proj),
    )


def _norm(norm: Any) -> Norm:
    if type(norm) is not nn.RMSNorm:
        raise UnfitError(f"unsupported norm {type(norm).__name__}")
    return Norm(_array(norm.weight)[:, None], norm.eps)


def _linears(*layers: Any) -> FusedLinear:
    bases = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in layers]
    if any(type(base) is not nn.Linear for base in bases):
        raise UnfitError("layers that are not dense")
    weights = [_array(base.weight) for base in bases]
    ends = np.cumsum([len(weight) for weight in weights]).tolist()
    places = tuple(slice(end - len(w), end) for end, w in zip(ends, weights, strict=True))
    adapters, downs = _adapters(layers)
    up = np.zeros((ends[-1], sum(map(len, downs))), np.float32) if downs else None
    for layer, place, adapter in zip(layers, places, adapters, strict=True):
        if adapter is not None and up is not None:
            mine = up[place, adapter.ranks]
            np.multiply(_array(layer.lora_b).T, np.float32(layer.scale), out=mine)
    return FusedLinear(
        beside(weights),
        places,
        _biases(bases, weights),
        np.ascontiguousarray(np.concatenate(downs)) if downs else None,
        up,
        adapters,
    )


def _adapters(layers: Sequence[Any]) -> tuple[tuple[AdapterSlice | None, ...], list[np.ndarray]]:
    """Adapters of layers with the same input, and lora_a (rank, in) of each that has one."""
    downs: list[np.ndarray] = []
    adapters: list[AdapterSlice | None] = []
    rank = 0
    for layer in layers:
        if not isinstance(layer, LoRALinear) or layer.scale == 0:
            adapters.append(None)
            continue
        downs.append(_array(layer.lora_a).T)
        adapters.append(AdapterSlice(slice(rank, rank + len(downs[-1])), layer.scale))
        rank += len(downs[-1])
    return tuple(adapters), downs


def _biases(bases: Sequence[Any], weights: Sequence[np.ndarray]) -> np.ndarray | None:
    """Biases (out of all layers, 1); None if no layer has one."""
    if not any("bias" in base for base in bases):
        return None
    parts = [
        _array(base.bias) if "bias" in base else np.zeros(len(weight), np.float32)
        for base, weight in zip(bases, weights, strict=True)
    ]
    return np.concatenate(parts)[:, None]


def lay_beside(*layers: Any) -> None:
    """Move the weights of layers with the same input into one array, in the layers themselves.

    Their values do not change, and only these layers' weights exist twice meanwhile.
    """
    bases = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in layers]
    whole = mx.concatenate([base.weight for base in bases])
    mx.eval(whole)
    start = 0
    for base in bases:
        end = start + len(base.weight)
        base.weight = whole[start:end]
        mx.eval(base.weight)
        start = end


def beside(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Stack these matrices: a view if they are adjacent in memory, else a copy."""
    if len(weights) == 1:
        return weights[0]
    ends = [weight.ctypes.data + weight.nbytes for weight in weights]
    starts = [weight.ctypes.data for weight in weights]
    if ends[:-1] != starts[1:] or not all(w.flags.c_contiguous for w in weights):
        return np.concatenate(weights)
    shape = (sum(map(len, weights)), weights[0].shape[1])
    return np.lib.stride_tricks.as_strided(weights[0], shape, writeable=False)


def _array(array: mx.array) -> np.ndarray:
    """View an MLX array in NumPy."""
    if array.dtype != mx.float32:
        raise UnfitError(f"weights in {array.dtype}")
    return np.array(array, copy=False)
