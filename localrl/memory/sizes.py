"""The sizes of a model that determine its memory, read from its config.json alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localrl.config import closest
from localrl.errors import ConfigError
from localrl.memory import blocks, families
from localrl.memory.families import FULL, NONE
from localrl.memory.layers import KINDS, BlockShape, Matrix, Packing
from localrl.memory.settings import complete, exceptions
from localrl.utils.stored_formats import StoredFormat, stored_format

__all__ = [
    "FULL",
    "NONE",
    "Parameters",
    "Sizes",
    "kv_bytes",
    "lora_parameters",
    "parameters",
    "quantised",
    "read_sizes",
    "weight_bytes",
]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a text model."""

    family: str
    """`model_type` of its config.json."""
    width: int
    """Width of the hidden state between blocks."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner width of a feed-forward layer, summed over all experts of a token."""
    vocabulary: int
    tied: bool
    """True if the head is the embedding."""
    windows: tuple[int, ...]
    """Cache kind of each block: FULL, NONE, or the size of its sliding window in tokens."""
    tail_numbers: int = 0
    """Size of the convolutions' last inputs that a row keeps, summed over all blocks."""
    state_numbers: int = 0
    """Size of a row's recurrent states, summed over all blocks; they are float32."""
    bits: int = 0
    """Bits of a quantised weight; 0: not quantised."""
    quant_group_size: int = 64
    stored_bytes: int | None = None
    """Bytes of the weight files; None: not on this machine."""
    float_bytes: int = 2
    """Bytes of a stored float: 2 for bfloat16 and float16, 4 for float32."""
    known: bool = True
    """True if the family is known matrix by matrix; False: read as if it were Llama."""
    blocks: tuple[BlockShape, ...] = ()
    """Contents of each block, for counting weights and caches; filled by `read_sizes`."""
    ends: BlockShape | None = None
    """Embedding, last norm, and the head unless it is tied."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.windows)

    @property
    def cached(self) -> tuple[int, ...]:
        """Numbers that a token adds to the cache of each block."""
        if not self.blocks:
            return (2 * self.kv_heads * self.head_dim,) * self.layers
        return tuple(block.cached for block in self.blocks)

    @property
    def matrices(self) -> Iterator[Matrix]:
        """Yield all matrices of the model."""
        for block in self.parts:
            yield from block.matrices

    @property
    def parts(self) -> tuple[BlockShape, ...]:
        """All blocks and the ends.

        Raises: ValueError if this was not made by `read_sizes`.
        """
        if self.ends is None:
            raise ValueError("Weights can only be counted in sizes made by read_sizes.")
        return (*self.blocks, self.ends)


@dataclass(frozen=True)
class Parameters:
    """Number of weights by kind; scales of quantised ones are not counted."""

    embedding: int
    head: int
    """Weights of the head; 0 if it is the embedding."""
    linear: int
    """Weights of linear layers in the blocks, routers and biases included."""
    experts: int
    others: int
    """Weights of norms and convolutions."""

    @property
    def total(self) -> int:
        """Total number of weights."""
        return self.embedding + self.head + self.linear + self.experts + self.others


def read_sizes(config: Mapping[str, Any], *, weight_bytes: int | None = None) -> Sizes:
    """Read the sizes of the text model in a parsed config.json, as mlx-lm builds it.

    weight_bytes: bytes of its weight files, if they are on this machine.

    Raises: ConfigError if a size is missing or impossible.
    """
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else {}
    family = families.find_family(config)
    text = complete({**config, **inner}, family)
    windows = families.kinds(text, family)
    tails, states = families.state_numbers(text, windows)
    found = Sizes(
        family=str(config.get("model_type", "")),
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        ffn=blocks.ffn(text, family),
        vocabulary=text["vocab_size"],
        tied=bool(text["tie_word_embeddings"]),
        windows=windows,
        tail_numbers=tails,
        state_numbers=states,
        stored_bytes=weight_bytes,
        float_bytes=4 if "float32" in (text.get("dtype"), text.get("torch_dtype")) else 2,
        known=family.known,
        blocks=tuple(blocks.blocks(text, family, windows)),
        ends=blocks.ends(text, family),
    )
    stored = stored_format(config)
    return _packed(found, stored, config.get("quantization") or {}) if stored.bits else found


def parameters(sizes: Sizes) -> Parameters:
    """Count the model's weights as mlx-lm does."""
    kinds = dict.fromkeys(("embedding", "head", "linear", "router", "experts"), 0)
    for matrix in sizes.matrices:
        kinds[matrix.kind] += matrix.weights + matrix.biases
    return Parameters(
        embedding=kinds["embedding"],
        head=kinds["head"],
        linear=kinds["linear"] + kinds["router"],
        experts=kinds["experts"],
        others=sum(part.others for part in sizes.parts),
    )


def weight_bytes(sizes: Sizes, *, float32: bool, dense: bool) -> int:
    """Compute the bytes of the weights as MLX holds them.

    float32: every float is cast to float32, scales of quantised weights too, as on the CPU. dense:
    quantised linear layers and embeddings are dequantised. For an unknown family whose files are
    present, the result is their size times the computed ratio to the stored form.
    """
    held = _bytes(sizes, 4 if float32 else sizes.float_bytes, dense)
    if sizes.known or sizes.stored_bytes is None:
        return held
    return round(held * sizes.stored_bytes / _bytes(sizes, sizes.float_bytes, False))


def lora_parameters(sizes: Sizes, rank: int, layers: int = 0, keys: Collection[str] = ()) -> int:
    """Count the weights of adapters of this rank on the last `layers` blocks (0: all).

    keys: paths inside a block, of linear layers or stacked experts, each of which has its own
    adapter; if empty, all linear layers except routers.

    Raises: ConfigError if there are fewer blocks, or, in a known family, no such layers.
    """
    if layers > sizes.layers:
        raise ConfigError(f"lora.layers is {layers}; the model has {sizes.layers} blocks (0: all).")
    adapted = [
        matrix
        for block in sizes.parts[:-1][sizes.layers - layers if layers else 0 :]
        for matrix in block.matrices
        if matrix.kind in ("linear", "router", "experts")
    ]
    _check_keys(keys, sorted({matrix.path for matrix in adapted}), sizes.known)
    return rank * sum(
        matrix.copies * (matrix.inputs + matrix.outputs)
        for matrix in adapted
        if (matrix.path in keys if keys else matrix.kind == "linear")
    )


def kv_bytes(
    sizes: Sizes,
    tokens: int,
    *,
    bytes_per_number: int,
    step: int = 64,
    prompt: int | None = None,
) -> int:
    """Compute the bytes of one row's cache when it holds this many tokens.

    Layers that keep all tokens grow by `step`. A layer with a window keeps the whole prompt until
    the first token after it, and then at most its window. prompt: number of tokens prefilled at
    once; None: the row is past its prompt, and windows count as grown by `step`.
    """
    numbers = sizes.tail_numbers + sum(
        cached * _kept(window, tokens, step, prompt)
        for window, cached in zip(sizes.windows, sizes.cached, strict=True)
    )
    return numbers * bytes_per_number + 4 * sizes.state_numbers


def quantised(sizes: Sizes, bits: int) -> Sizes:
    """Return the sizes after `localrl train --quantize`: groups of 64, or of 32 if 64 do not fit.

    0 bits, or the bits the model already has, change nothing. Otherwise the size of its files is no
    longer known.
    """
    if bits in (0, sizes.bits) or sizes.ends is None:
        return sizes
    parts = [part.packed(Packing(bits, 32)).packed(Packing(bits, 64)) for part in sizes.parts]
    special = families.find_family({"model_type": sizes.family}).eight_bits
    parts = [part.overridden(_eight_bits(part, special)) for part in parts]
    return replace(sizes, bits=bits, blocks=tuple(parts[:-1]), ends=parts[-1], stored_bytes=None)


def _eight_bits(part: BlockShape, paths: Collection[str]) -> dict[str, dict[str, int]]:
    """Settings that give quantised matrices of these paths 8 bits."""
    return {
        matrix.path: {"bits": 8, "group_size": matrix.packing.group_size}
        for matrix in part.matrices
        if matrix.path in paths and matrix.packing.bits
    }


def _packed(sizes: Sizes, stored: StoredFormat, settings: Mapping[str, Any]) -> Sizes:
    """Sizes of a model that is stored in this format. settings: mlx-lm's `quantization`, if any."""
    packing = Packing(stored.bits, stored.group_size, stored.mode)
    kinds = ("linear", "experts") if stored.within_blocks else KINDS
    special = exceptions(settings)
    blocks = [
        block.packed(packing, kinds).overridden(special.get(number, {}))
        for number, block in enumerate(sizes.parts[:-1])
    ]
    ends = sizes.parts[-1]
    if not stored.within_blocks:
        ends = ends.packed(packing).overridden(special.get(None, {}))
    return replace(
        sizes,
        bits=packing.bits,
        quant_group_size=packing.group_size,
        blocks=tuple(blocks),
        ends=ends,
    )


def _bytes(sizes: Sizes, float_bytes: int, dense: bool) -> int:
    matrices = sum(m.bytes(float_bytes=float_bytes, dense=dense) for m in sizes.matrices)
    return matrices + float_bytes * sum(part.others for part in sizes.parts)


def _check_keys(keys: Collection[str], paths: Sequence[str], known: bool) -> None:
    for key in sorted(set(keys) - set(paths)):
        if known:
            raise ConfigError(
                f"lora.keys contains {key!r}, which is not a linear layer of the adapted blocks."
                f"{closest(key, paths)} Available: {', '.join(paths)}."
            )


def _kept(window: int, tokens: int, step: int, prompt: int | None) -> int:
    """Number of tokens that a layer's cache has room for."""
    if window == NONE:
        return 0
    if window == FULL:
        return _ceil(tokens, step)
    first = prompt or 0
    if first and tokens <= first:
        return tokens
    return window if first >= window else min(window, first + _ceil(tokens - first, step))


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step
