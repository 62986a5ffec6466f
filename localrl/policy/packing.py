"""Packing of ragged tokens into rectangles; only this and `forest_packing` pad, shift and mask.

A row is a prompt followed by one root-to-leaf path. Position j of a row predicts token j + 1. A
token shared by several paths is a target only in the first of them, so it counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from localrl.policy.forest_packing import Layout, pack_forest
from localrl.records import Batch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of the update, unpadded; all arrays except the first belong to the targets."""

    token_ids: np.ndarray
    """(L,) int32, prompt and completion."""
    targets: np.ndarray
    """(n,) trained positions in `token_ids`, each at least 1."""
    coefficients: np.ndarray
    """(n,) float32."""
    anchor_logprobs: np.ndarray
    """(n,) float32."""
    kl_weights: np.ndarray
    """(n,) float32."""
    nodes: np.ndarray
    """(n,) index into the nodes of the batch."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward pass and its N trained tokens."""

    tokens: np.ndarray | Layout
    """Rows (B, L) int32, padded on the right with 0, which causal attention ignores; or the levels
    of a forest."""
    sources: np.ndarray
    """(N,) index into all flattened positions: the position that predicts each target."""
    targets: np.ndarray
    """(N,) int32, the predicted tokens."""
    coefficients: np.ndarray
    """(N,) float32."""
    anchor_logprobs: np.ndarray
    """(N,) float32."""
    kl_weights: np.ndarray
    """(N,) float32."""
    rows: np.ndarray
    """(N,) row or tree of each target, from 0."""
    nodes: np.ndarray
    """(N,) index into the nodes of the batch. A node's targets are adjacent, in token order."""
    saved_positions: int = 0
    """Extra positions that the same paths would have taken as separate rows."""


def forest_batches(batch: Batch, size: int) -> Iterator[MicroBatch]:
    """Pack trees of up to `size` paths at a time; each prompt and node is computed once.

    A tree with more paths is not split.
    """
    for packed in pack_forest(batch, size):
        nodes = [(batch.nodes[n], batch.nodes[n].trained) for n in packed.nodes]
        starts = packed.layout.starts[packed.branches]
        yield MicroBatch(
            tokens=packed.layout,
            sources=np.concatenate(
                [start + np.flatnonzero(m) for start, (_, m) in zip(starts, nodes, strict=True)]
            ),
            targets=np.concatenate([node.token_ids[m] for node, m in nodes]),
            coefficients=np.concatenate([node.coefficients[m] for node, m in nodes]),
            anchor_logprobs=np.concatenate([node.anchor_logprobs[m] for node, m in nodes]),
            kl_weights=np.concatenate([node.kl_weights[m] for node, m in nodes]),
            rows=np.repeat(packed.trees, [int(m.sum()) for _, m in nodes]),
            nodes=np.repeat(packed.nodes, [int(m.sum()) for _, m in nodes]),
            saved_positions=packed.row_positions - packed.layout.positions,
        )


def rows_of(batch: Batch) -> list[Row]:
    """List the paths of the batch that have targets.

    Targets are the tokens with a nonzero coefficient or KL weight.
    """
    result = []
    counted: set[int] = set()
    for end, node in enumerate(batch.nodes):
        if not node.finish:
            continue
        row = _row(batch, _path(batch, end), counted)
        if len(row.targets):
            result.append(row)
    return result


def row_batches(batch: Batch, size: int) -> Iterator[MicroBatch]:
    """Pack rows of similar length, `size` at a time, each padded to its own longest row."""
    rows = rows_of(batch)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids), i))
    for start in range(0, len(order), size):
        yield pack([rows[i] for i in order[start : start + size]])


def pack(rows: Sequence[Row]) -> MicroBatch:
    """Pack these rows into one rectangle."""
    length = max(len(row.token_ids) for row in rows)
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.token_ids)] = row.token_ids
    return MicroBatch(
        tokens=tokens,
        sources=np.concatenate([i * length + row.targets - 1 for i, row in enumerate(rows)]),
        targets=np.concatenate([row.token_ids[row.targets] for row in rows]),
        coefficients=np.concatenate([row.coefficients for row in rows]),
        anchor_logprobs=np.concatenate([row.anchor_logprobs for row in rows]),
        kl_weights=np.concatenate([row.kl_weights for row in rows]),
        rows=np.repeat(np.arange(len(rows)), [len(row.targets) for row in rows]),
        nodes=np.concatenate([row.nodes for row in rows]),
    )


def _path(batch: Batch, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = batch.nodes[node].parent
    return path[::-1]


def _row(batch: Batch, path: Sequence[int], counted: set[int]) -> Row:
    """Build the row of one path; nodes counted in an earlier row are only context here."""
    prompt = batch.prompts[batch.nodes[path[0]].prompt]
    nodes = [batch.nodes[i] for i in path]
    tokens = np.concatenate([np.asarray(prompt, np.int32), *(node.token_ids for node in nodes)])
    coefficients = np.zeros(len(tokens), np.float32)
    anchors = np.zeros(len(tokens), np.float32)
    kl_weights = np.zeros(len(tokens), np.float32)
    owners = np.zeros(len(tokens), np.int64)
    start = len(prompt)
    for index, node in zip(path, nodes, strict=True):
        end = start + len(node.token_ids)
        if index not in counted:
            coefficients[start:end] = node.coefficients
            anchors[start:end] = node.anchor_logprobs
            kl_weights[start:end] = node.kl_weights
            owners[start:end] = index
            counted.add(index)
        start = end
    targets = np.flatnonzero((coefficients != 0) | (kl_weights != 0))
    columns = (coefficients, anchors, kl_weights, owners)
    return Row(tokens, targets, *(column[targets] for column in columns))
