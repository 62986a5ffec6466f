"""The parts of a model's blocks: matrices and a few other weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from localrl.utils.stored_formats import named_format

KINDS = ("linear", "router", "experts", "embedding", "head")
"""The kinds of matrices."""


@dataclass(frozen=True)
class Packing:
    """The number format of a matrix."""

    bits: int = 0
    """Bits of a weight; 0: floats, like the rest of the model."""
    group_size: int = 64
    """Number of weights that share a scale."""
    mode: str = "affine"
    """MLX's quantisation mode; any but affine has one byte per group, no scale and bias."""
    global_scale: bool = False
    """True if each of stacked experts has one more scale, in float32."""

    def fits(self, matrix: Matrix) -> bool:
        """Return True if the group size divides the rows of the matrix."""
        return matrix.inputs % self.group_size == 0


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights, or one for each expert."""

    path: str
    """mlx-lm's path of the matrix within its block, or within the model."""
    inputs: int
    outputs: int
    bias: bool = False
    kind: Literal["linear", "router", "experts", "embedding", "head"] = "linear"
    copies: int = 1
    """Number of experts."""
    packing: Packing = Packing()

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.copies * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Number of bias values."""
        return self.copies * self.outputs if self.bias else 0

    def bytes(self, *, float_bytes: int, dense: bool) -> int:
        """Bytes of the matrix if a float has `float_bytes` bytes.

        dense: dequantised, as localrl does with all quantised matrices except stacked experts.
        """
        packing, biases = self.packing, self.biases * float_bytes
        if not packing.bits or (dense and self.kind != "experts"):
            return self.weights * float_bytes + biases
        of_group = 2 * float_bytes if packing.mode == "affine" else 1
        groups = self.weights // packing.group_size
        whole = 4 * self.copies if packing.global_scale else 0
        return self.weights * packing.bits // 8 + groups * of_group + biases + whole


@dataclass(frozen=True)
class BlockShape:
    """One layer of a model, or the parts before and after all layers."""

    matrices: tuple[Matrix, ...]
    others: int
    """Number of weights of norms and convolutions, which are never quantised."""
    cached: int = 0
    """Numbers that a token adds to the cache of the layer: its keys and values."""
    queries: int = 0
    """Width of the queries of its attention; 0: it has none."""
    gated: int = 0
    """Width of its attention's gate, or of what its recurrent layer or convolution computes."""
    inner: int = 0
    """Inner width of its feed-forward layer, summed over all experts of a token."""

    @property
    def mixer(self) -> str:
        """mlx-lm's name of the layer that mixes tokens, the first one: attention, or another."""
        return self.matrices[0].path.split(".")[0]

    def packed(self, packing: Packing, kinds: Collection[str] = KINDS) -> BlockShape:
        """Return the block with all matrices of these kinds quantised that the groups divide."""
        return replace(
            self,
            matrices=tuple(
                replace(matrix, packing=packing)
                if packing.fits(matrix) and matrix.kind in kinds
                else matrix
                for matrix in self.matrices
            ),
        )

    def overridden(self, settings: Mapping[str, Any]) -> BlockShape:
        """Return the block with config.json's quantisation settings for individual paths."""
        changes = {m.path: settings[m.path] for m in self.matrices if m.path in settings}
        return replace(
            self,
            matrices=tuple(
                replace(matrix, packing=_own(matrix.packing, changes.get(matrix.path, True)))
                for matrix in self.matrices
            ),
        )


def _own(packing: Packing, setting: Any) -> Packing:
    """The format of a matrix; setting: False, True for the model's own, or a format of its own.

    What the latter does not name is MLX's default, not the model's: mlx-lm passes it on alone.
    """
    if setting is False:
        return Packing()
    if not isinstance(setting, Mapping):
        return packing
    own = named_format(setting)
    return Packing(own.bits, own.group_size, own.mode, bool(setting.get("global_scale")))
