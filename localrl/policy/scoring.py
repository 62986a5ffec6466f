"""Log-probabilities of given tokens under the policy, with gradient and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from localrl.backend import mx, tree_flatten
from localrl.policy.array_scoring import array_logprobs
from localrl.policy.checkpointing import checkpointed
from localrl.policy.forest import forest_states
from localrl.policy.forest_packing import Layout
from localrl.policy.model import Policy
from localrl.policy.packing import MicroBatch, forest_batches, row_batches
from localrl.records import Batch, BatchNode, Group

Head = Callable[[mx.array], mx.array]


def token_logprobs(
    policy: Policy,
    micro: MicroBatch,
    *,
    temperature: float,
    head_chunk: int,
    gradient: bool = False,
    recompute: bool = False,
) -> mx.array:
    """Float32 log-probabilities (N,) of a micro-batch's targets.

    The distribution is that of the sampler: logits divided by the temperature, over the whole
    vocabulary. gradient: the result is differentiated by the adapters; with `recompute` what goes
    on inside a block is computed again then.
    """
    if policy.arrays is not None:
        return array_logprobs(
            policy.arrays,
            micro,
            temperature=temperature,
            head_chunk=head_chunk,
            gradient=gradient,
            recompute=recompute,
        )
    with checkpointed(policy) if recompute else nullcontext():
        return _token_logprobs(policy, micro, temperature, head_chunk)


def _token_logprobs(
    policy: Policy, micro: MicroBatch, temperature: float, head_chunk: int
) -> mx.array:
    sources, targets = mx.array(micro.sources), mx.array(micro.targets)
    if isinstance(micro.tokens, Layout):
        states = forest_states(policy, micro.tokens)  # (positions, d)
    elif policy.hidden is not None:
        states = policy.hidden(mx.array(micro.tokens))  # (B, L, d)
    else:
        logits = policy.model(mx.array(micro.tokens))  # (B, L, V)
        flat = logits.reshape(-1, logits.shape[-1])[sources]
        return gather_logprobs(flat, targets, temperature)
    assert policy.head is not None
    flat = states.reshape(-1, states.shape[-1])[sources]  # (N, d)
    return head_logprobs(policy.head, flat, targets, temperature, head_chunk)


def group_logprobs(
    policy: Policy,
    groups: Sequence[Group],
    *,
    shared: bool,
    micro_rows: int,
    head_chunk: int,
    temperature: float,
) -> list[list[np.ndarray]]:
    """Float32 log-probabilities (n,) of every node of every group under the policy as it is now.

    0 where the model did not write the token. One forward pass, `micro_rows` paths at a time, as
    forests when `shared`, else as plain rows; nothing is kept for a gradient.
    """
    batch = _whole(groups)
    found = [np.zeros(len(node.token_ids), np.float32) for node in batch.nodes]
    pack = forest_batches if shared else row_batches
    for micro in pack(batch, micro_rows):
        logprobs = np.array(
            token_logprobs(policy, micro, temperature=temperature, head_chunk=head_chunk)
        )
        edges = np.flatnonzero(np.diff(micro.nodes)) + 1
        for n, values in zip(micro.nodes[[0, *edges]], np.split(logprobs, edges), strict=True):
            found[n][batch.nodes[n].trained] = values
    rest = iter(found)
    return [[next(rest) for _ in group.nodes] for group in groups]


def _whole(groups: Sequence[Group]) -> Batch:
    """The groups as a batch in which every sampled token is a target."""
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
    """Whether the forest of the batch's first prompt scores its tokens as plain rows do.

    A family may keep more between tokens than keys and values, or ask its cache for more.
    """
    if policy.hidden is None:
        return False
    first = sum(node.prompt == 0 for node in batch.nodes)
    one_prompt = Batch(batch.prompts[:1], batch.nodes[:first], batch.z)

    def score(pack: Callable[[Batch, int], Iterator[MicroBatch]]) -> np.ndarray:
        micros = pack(one_prompt, first)
        found = [
            np.array(token_logprobs(policy, micro, temperature=temperature, head_chunk=head_chunk))
            for micro in micros
        ]
        return np.sort(np.concatenate(found))  # the two take their targets in different orders

    rows = score(row_batches)
    try:
        forest = score(forest_batches)
    except Exception:  # whatever a family's own code raises, rows will do
        return False
    return bool(np.abs(rows - forest).max() < _tolerance(policy))


def _tolerance(policy: Policy) -> float:
    """Nats that two orders of the same sums may differ by."""
    parameters: Any = tree_flatten(policy.model.parameters())
    kinds = {array.dtype for _, array in parameters}
    return 0.3 if kinds & {mx.bfloat16, mx.float16} else 1e-3


def head_logprobs(
    head: Head, states: mx.array, targets: mx.array, temperature: float, chunk: int
) -> mx.array:
    """Log-probabilities (N,) from states (N, d), with the logits of `chunk` positions at a time.

    The gradient is closed-form, d logp / d logits = (onehot(target) - softmax) / temperature, taken
    through the frozen head chunk by chunk; no chunk's logits are kept for it. Idea: Liger Kernel,
    Hsu et al. 2024 (arXiv 2410.10989), which fuses a cross-entropy into the head.
    """

    def score(states: mx.array) -> mx.array:
        done: list[mx.array] = []
        for part, piece in _one_by_one(states, chunk, done):
            done.append(gather_logprobs(head(piece), targets[part], temperature))
        return mx.concatenate(done)

    def gradient(states: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        done: list[mx.array] = []
        for part, piece in _one_by_one(states, chunk, done):
            logits = head(piece)
            weight = cotangent[part] / temperature
            softmax = mx.softmax(logits.astype(mx.float32) / temperature, axis=-1)
            slope = (
                (-weight[:, None] * softmax).at[mx.arange(len(piece)), targets[part]].add(weight)
            )
            done += mx.vjp(head, [piece], [slope.astype(logits.dtype)])[1]
        return mx.concatenate(done)

    scored: Any = mx.custom_function(score)
    scored.vjp(gradient)
    return scored(states)


def gather_logprobs(logits: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probabilities (N,) of `targets` from logits (N, V), in float32."""
    logits = logits.astype(mx.float32) / temperature
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


def _one_by_one(
    states: mx.array, chunk: int, done: list[mx.array]
) -> Iterator[tuple[slice, mx.array]]:
    """Pieces of the states, each to be computed only after what was made of the one before."""
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        yield part, mx.depends([states[part]], done[-1:])[0] if done else states[part]
