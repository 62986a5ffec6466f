"""What the blocks of a model consist of: matrices, and the few weights beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Packing:
    """How the numbers of a matrix are held."""

    bits: int = 0
    """Of a number; 0: floats, as the rest of the model."""
    group_size: int = 64
    """Numbers that share a scale."""
    mode: str = "affine"
    """Of MLX; with any other than affine a group has one byte instead of a scale and a bias."""

    def fits(self, matrix: Matrix) -> bool:
        """Whether the groups divide the rows of the matrix."""
        return matrix.inputs % self.group_size == 0


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights, or one for each expert."""

    path: str
    """Within its block, or within the model, as mlx-lm calls it."""
    inputs: int
    outputs: int
    bias: bool = False
    kind: Literal["linear", "router", "experts", "embedding", "head"] = "linear"
    copies: int = 1
    """Experts."""
    packing: Packing = Packing()

    @property
    def weights(self) -> int:
        """Numbers in it, without its bias."""
        return self.copies * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Numbers that are added to its outputs."""
        return self.copies * self.outputs if self.bias else 0

    def bytes(self, *, float_bytes: int, dense: bool) -> int:
        """What it takes when a float has that many bytes.

        dense: unpacked, as localrl does with all quantised matrices but stacked experts.
        """
        packing, biases = self.packing, self.biases * float_bytes
        if not packing.bits or (dense and self.kind != "experts"):
            return self.weights * float_bytes + biases
        of_group = 2 * float_bytes if packing.mode == "affine" else 1
        groups = self.weights // packing.group_size
        return self.weights * packing.bits // 8 + groups * of_group + biases


@dataclass(frozen=True)
class Block:
    """One layer of a model, or what stands before and after them all."""

    matrices: tuple[Matrix, ...]
    others: int
    """Weights of norms and convolutions, which are never quantised."""

    def packed(self, packing: Packing) -> Block:
        """The same, with every matrix packed whose rows the groups divide."""
        return replace(
            self,
            matrices=tuple(
                replace(matrix, packing=packing) if packing.fits(matrix) else matrix
                for matrix in self.matrices
            ),
        )

    def overridden(self, settings: Mapping[str, Any]) -> Block:
        """The same, with the quantisation that config.json says for single paths."""
        changes = {m.path: settings[m.path] for m in self.matrices if m.path in settings}
        return replace(
            self,
            matrices=tuple(
                replace(matrix, packing=_own(matrix.packing, changes.get(matrix.path, True)))
                for matrix in self.matrices
            ),
        )


def _own(packing: Packing, setting: Any) -> Packing:
    """The packing of a matrix; setting: False, True for the model's own, or bits and group size."""
    if setting is False:
        return Packing()
    if not isinstance(setting, Mapping):
        return packing
    named = {name: setting[name] for name in ("bits", "group_size", "mode") if name in setting}
    return replace(packing, **named)
