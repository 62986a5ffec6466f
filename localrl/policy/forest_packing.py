"""Packing of a batch into levels of branches: the forest counterpart of `packing`.

A branch is a node shifted by one token: its inputs are the last token before the node and all of
the node's own tokens except the last, so every token of a node is predicted within its branch.
Branches of one depth form a rectangle, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from localrl.records import Batch, BatchNode


@dataclass(frozen=True, eq=False)
class Branch:
    """A run of input tokens that follows its parent's."""

    parent: int
    """Index of the parent branch, -1 at the start of a sequence. Parents come first."""
    inputs: np.ndarray
    """(n,) int32, n >= 1."""


@dataclass(frozen=True, eq=False)
class Level:
    """Branches of one depth as a rectangle."""

    tokens: np.ndarray
    """(R, L) int32, padded with 0 on the right."""
    lengths: np.ndarray
    """(R,) int32, true lengths."""
    parents: np.ndarray
    """(R,) int32, parent rows in the level above; empty for the first level."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A forest in levels."""

    levels: tuple[Level, ...]
    starts: np.ndarray
    """(branches,) start of each branch in the flattened positions of all levels."""

    @property
    def positions(self) -> int:
        """Number of tokens computed, without padding."""
        return int(sum(level.lengths.sum() for level in self.levels))


@dataclass(frozen=True, eq=False)
class PackedForest:
    """Some trees of a batch, laid out for one forward pass."""

    layout: Layout
    nodes: tuple[int, ...]
    """Indices of the included batch nodes, excluding empty ones."""
    branches: np.ndarray
    """(nodes,) branch of each node."""
    trees: np.ndarray
    """(nodes,) tree of each node, from 0."""
    row_positions: int
    """Positions that the same paths would take as separate rows."""


def pack_forest(batch: Batch, size: int) -> Iterator[PackedForest]:
    """Pack the trees with trained tokens into forests of at most `size` paths each.

    A tree is a root with its descendants; one with more paths than `size` is packed alone. Nodes
    below which nothing is trained are left out. Trees of one prompt are adjacent; prompts are
    ordered by length.
    """
    trees = _trees(batch)
    builder, paths = _ForestBuilder(batch), 0
    for root in sorted(trees, key=lambda root: _order(batch, root)):
        ends = _ends(batch, trees[root])
        if paths and paths + len(ends) > size:
            yield builder.packed()
            builder, paths = _ForestBuilder(batch), 0
        builder.add(trees[root], ends)
        paths += len(ends)
    if paths:
        yield builder.packed()


@dataclass(eq=False)
class _ForestBuilder:
    """Collects the branches of some trees."""

    batch: Batch
    branches: list[Branch] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    trees: list[int] = field(default_factory=list)
    row_positions: int = 0
    _added: int = 0
    _prompts: dict[int, int] = field(default_factory=dict)
    _branch: dict[int, int] = field(default_factory=dict)
    """Branch at the end of each node; an ancestor's branch if the node has no tokens."""
    _last: dict[int, int] = field(default_factory=dict)
    """Last token on the path to the end of each node."""
    _length: dict[int, int] = field(default_factory=dict)
    """Number of tokens on the path to the end of each node, including the prompt."""

    def add(self, tree: Sequence[int], ends: set[int]) -> None:
        """Add a tree's nodes, parents first; trees of one prompt share its branch."""
        for n in tree:
            node = self.batch.nodes[n]
            branch, last, length = self._above(node)
            if len(node.token_ids):
                inputs = np.concatenate([[last], node.token_ids[:-1]]).astype(np.int32)
                self.branches.append(Branch(branch, inputs))
                branch, last = len(self.branches) - 1, int(node.token_ids[-1])
                self.nodes.append(n)
                self.trees.append(self._added)
            self._branch[n], self._last[n] = branch, last
            self._length[n] = length + len(node.token_ids)
        self._added += 1
        self.row_positions += sum(self._length[n] for n in ends)

    def packed(self) -> PackedForest:
        """Lay out the collected branches in levels."""
        branches = np.array([self._branch[n] for n in self.nodes])
        return PackedForest(
            lay_out(self.branches),
            tuple(self.nodes),
            branches,
            np.array(self.trees),
            self.row_positions,
        )

    def _above(self, node: BatchNode) -> tuple[int, int, int]:
        """Return the branch that a node continues, and the last token and length before it."""
        if node.parent >= 0:
            return self._branch[node.parent], self._last[node.parent], self._length[node.parent]
        prompt = list(self.batch.prompts[node.prompt])
        if len(prompt) > 1 and node.prompt not in self._prompts:
            self.branches.append(Branch(-1, np.array(prompt[:-1], np.int32)))
            self._prompts[node.prompt] = len(self.branches) - 1
        return self._prompts.get(node.prompt, -1), prompt[-1], len(prompt)


def lay_out(branches: Sequence[Branch]) -> Layout:
    """Arrange branches in levels by depth."""
    depths: list[int] = []
    for branch in branches:
        depths.append(depths[branch.parent] + 1 if branch.parent >= 0 else 0)
    levels: list[Level] = []
    starts, rows = np.zeros(len(branches), np.int64), np.zeros(len(branches), np.int64)
    offset = 0
    for depth in range(max(depths) + 1):
        members = [i for i, d in enumerate(depths) if d == depth]
        lengths = np.array([len(branches[i].inputs) for i in members], dtype=np.int32)
        tokens = np.zeros((len(members), int(lengths.max())), np.int32)
        for row, i in enumerate(members):
            tokens[row, : lengths[row]] = branches[i].inputs
        rows[members] = np.arange(len(members))
        starts[members] = offset + rows[members] * tokens.shape[1]
        parents = rows[[branches[i].parent for i in members if depth]]
        levels.append(Level(tokens, lengths, parents.astype(np.int32)))
        offset += tokens.size
    return Layout(tuple(levels), starts)


def _trees(batch: Batch) -> dict[int, list[int]]:
    """Map each root to its nodes on a path to a trained token, parents first."""
    wanted = [bool(node.trained.any()) for node in batch.nodes]
    for n in reversed(range(len(batch.nodes))):
        parent = batch.nodes[n].parent
        if wanted[n] and parent >= 0:
            wanted[parent] = True
    trees: dict[int, list[int]] = {}
    roots: list[int] = []
    for n, node in enumerate(batch.nodes):
        roots.append(roots[node.parent] if node.parent >= 0 else n)
        if wanted[n]:
            trees.setdefault(roots[n], []).append(n)
    return trees


def _ends(batch: Batch, tree: Sequence[int]) -> set[int]:
    """Return the tree's nodes without a child in it: one per path."""
    return set(tree) - {batch.nodes[n].parent for n in tree}


def _order(batch: Batch, root: int) -> tuple[int, int, int]:
    prompt = batch.nodes[root].prompt
    return len(batch.prompts[prompt]), prompt, root
