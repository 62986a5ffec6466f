"""Log-probabilities of whole groups, and a check that forests score like plain rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.policy.precision import float32_activations
from localrl.policy.selfcheck import Check
from localrl.records import Batch, BatchNode, Group

MEAN_LIMITS, P99_LIMITS = (0.01, 0.06), (0.05, 0.3)
"""Differences in nats between forest and rows from which to warn, and from which to use rows.

In float32 the mean is near 1e-6, with TF32 2e-3 (99th percentile 0.011). A family whose activations
are bfloat16 regardless stays below the upper limits (0.038 and 0.18 on a model of 135 million
weights); positions that are off by one exceed them even with random weights (0.11 and 0.46).
"""


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
    batch = whole_batch(groups)
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


def whole_batch(groups: Sequence[Group]) -> Batch:
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
    The result is added to the policy's checks.
    """
    engine = policy.engine
    if engine.packs_forests is not None:
        return engine.packs_forests
    errors = np.array([np.inf])
    with float32_activations(policy.model):
        score = partial(_by_node, policy, batch, temperature, head_chunk)
        rows = score(row_batches)
        # A family's own code may raise anything; use rows then.
        with suppress(Exception):
            errors = np.abs(rows - score(forest_batches))
    checks = [
        Check("forest_mean", float(errors.mean()), *MEAN_LIMITS),
        Check("forest_p99", float(np.sort(errors)[int(0.99 * len(errors))]), *P99_LIMITS),
    ]
    policy.checks.extend(checks)
    return all(check.accepted for check in checks)


def _by_node(
    policy: Policy,
    batch: Batch,
    temperature: float,
    head_chunk: int,
    pack: Callable[[Batch, int], Iterator[MicroBatch]],
) -> np.ndarray:
    """Log-probabilities of the first prompt's targets, by node and token."""
    first = sum(node.prompt == 0 for node in batch.nodes)
    one_prompt = Batch(batch.prompts[:1], batch.nodes[:first], batch.z)
    micros = list(pack(one_prompt, first))
    found = [
        np.array(
            policy.engine.token_logprobs(micro, temperature=temperature, head_chunk=head_chunk)
        )
        for micro in micros
    ]
    nodes = np.concatenate([micro.nodes for micro in micros])
    return np.concatenate(found)[np.argsort(nodes, kind="stable")]
