"""Log-probabilities of whole groups, and a check that forests score like plain rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from localrl.backend import mx, tree_flatten
from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.records import Batch, BatchNode, Group


def group_logprobs(
    policy: Policy,
    groups: Sequence[Group],
    *,
    shared: bool,
    micro_rows: int,
    head_chunk: int,
    temperature: float,
) -> list[list[np.ndarray]]:
    """Compute float32 log-probabilities (n,) of every node of every group under the current policy.

    0 where the model did not write the token. One forward pass, `micro_rows` paths at a time, as
    forests if `shared`, else as plain rows; nothing is kept for a gradient.
    """
    batch = _whole(groups)
    found = [np.zeros(len(node.token_ids), np.float32) for node in batch.nodes]
    pack = forest_batches if shared else row_batches
    for micro in pack(batch, micro_rows):
        logprobs = np.array(
            policy.engine.token_logprobs(micro, temperature=temperature, head_chunk=head_chunk)
        )
        edges = np.flatnonzero(np.diff(micro.nodes)) + 1
        for n, values in zip(micro.nodes[[0, *edges]], np.split(logprobs, edges), strict=True):
            found[n][batch.nodes[n].trained] = values
    rest = iter(found)
    return [[next(rest) for _ in group.nodes] for group in groups]


def _whole(groups: Sequence[Group]) -> Batch:
    """Build a batch from the groups in which every sampled token is a target."""
    nodes: list[BatchNode] = []
    for prompt, group in enumerate(groups):
        offset = len(nodes)
        inner = {node.parent for node in group.nodes}
        nodes += [
            BatchNode(
                prompt=prompt,
                parent=node.parent + offset if node.parent >= 0 else -1,
                token_ids=node.token_ids,
                coefficients=node.sampled.astype(np.float32),
                anchor_logprobs=node.sampled_logprobs,
                finish=n not in inner,
                kl_weights=np.zeros(len(node.token_ids), np.float32),
            )
            for n, node in enumerate(group.nodes)
        ]
    return Batch(tuple(group.prompt_ids for group in groups), tuple(nodes), 1.0)


def forest_agrees(policy: Policy, batch: Batch, *, temperature: float, head_chunk: int) -> bool:
    """Check that the forest of the batch's first prompt scores its tokens like plain rows.

    A family may keep more state between tokens than keys and values, or need more of its cache.
    """
    engine = policy.engine
    if engine.packs_forests is not None:
        return engine.packs_forests
    first = sum(node.prompt == 0 for node in batch.nodes)
    one_prompt = Batch(batch.prompts[:1], batch.nodes[:first], batch.z)

    def score(pack: Callable[[Batch, int], Iterator[MicroBatch]]) -> np.ndarray:
        micros = pack(one_prompt, first)
        found = [
            np.array(engine.token_logprobs(micro, temperature=temperature, head_chunk=head_chunk))
            for micro in micros
        ]
        return np.sort(np.concatenate(found))  # the two order their targets differently

    rows = score(row_batches)
    try:
        forest = score(forest_batches)
    except Exception:  # a family's own code may raise anything; use rows then
        return False
    return bool(np.abs(rows - forest).max() < _tolerance(policy))


def _tolerance(policy: Policy) -> float:
    """Return the difference in nats allowed between two summation orders."""
    parameters: Any = tree_flatten(policy.model.parameters())
    kinds = {array.dtype for _, array in parameters}
    return 0.3 if kinds & {mx.bfloat16, mx.float16} else 1e-3
