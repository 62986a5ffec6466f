"""From ragged tokens to rectangles: the only place that pads, shifts and masks.

A row is one root-to-leaf path behind its prompt. Position j of a row predicts token j + 1. A token
shared by several paths is a target in the first of them only, so it counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from localrl.records import Batch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of the update, still ragged; the three arrays belong to the same targets."""

    token_ids: np.ndarray
    """(L,) int32, prompt and completion."""
    targets: np.ndarray
    """(n,) positions in `token_ids` that are trained, each at least 1."""
    coefficients: np.ndarray
    """(n,) float32."""
    sampled_logprobs: np.ndarray
    """(n,) float32."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A rectangle for one forward pass: B rows of padded length L, N trained tokens in all."""

    tokens: np.ndarray
    """(B, L) int32, padded with 0 on the right; causal attention never looks there."""
    sources: np.ndarray
    """(N,) index into the B * L flattened positions: where each target is predicted."""
    targets: np.ndarray
    """(N,) int32, the tokens predicted."""
    coefficients: np.ndarray
    """(N,) float32."""
    sampled_logprobs: np.ndarray
    """(N,) float32."""


def rows(batch: Batch) -> list[Row]:
    """The paths of the batch that have something to teach.

    Targets are the tokens with a coefficient other than 0.
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


def micro_batches(rows: Sequence[Row], size: int) -> Iterator[MicroBatch]:
    """Rows of similar length, `size` at a time, each batch padded to its own longest row."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids), i))
    for start in range(0, len(order), size):
        yield pack([rows[i] for i in order[start : start + size]])


def pack(rows: Sequence[Row]) -> MicroBatch:
    """One rectangle from these rows."""
    length = max(len(row.token_ids) for row in rows)
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.token_ids)] = row.token_ids
    return MicroBatch(
        tokens=tokens,
        sources=np.concatenate([i * length + row.targets - 1 for i, row in enumerate(rows)]),
        targets=np.concatenate([row.token_ids[row.targets] for row in rows]),
        coefficients=np.concatenate([row.coefficients for row in rows]),
        sampled_logprobs=np.concatenate([row.sampled_logprobs for row in rows]),
    )


def _path(batch: Batch, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = batch.nodes[node].parent
    return path[::-1]


def _row(batch: Batch, path: Sequence[int], counted: set[int]) -> Row:
    """The row of one path; nodes that an earlier row has counted are context here."""
    prompt = batch.prompts[batch.nodes[path[0]].prompt]
    nodes = [batch.nodes[i] for i in path]
    tokens = np.concatenate([np.asarray(prompt, np.int32), *(node.token_ids for node in nodes)])
    coefficients = np.zeros(len(tokens), np.float32)
    sampled = np.zeros(len(tokens), np.float32)
    start = len(prompt)
    for index, node in zip(path, nodes, strict=True):
        end = start + len(node.token_ids)
        if index not in counted:
            coefficients[start:end] = node.coefficients
            sampled[start:end] = node.sampled_logprobs
            counted.add(index)
        start = end
    targets = np.flatnonzero(coefficients)
    return Row(tokens, targets, coefficients[targets], sampled[targets])
