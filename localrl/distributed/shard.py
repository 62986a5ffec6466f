"""Divides a batch among ranks: whole prompts, so that trees stay together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from localrl.records import Batch


def shard_batch(batch: Batch, rank: int, size: int) -> Batch:
    """Return the part of a batch that one of `size` ranks updates on; parts add up to the batch.

    Prompts are assigned longest first, each to the rank with the fewest tokens so far. The
    denominator is that of the whole batch. A part may be empty.
    """
    if size == 1:
        return batch
    tokens = np.array([len(prompt) for prompt in batch.prompts], int)
    np.add.at(tokens, [node.prompt for node in batch.nodes], _lengths(batch))
    loads, owners = [0] * size, [0] * len(tokens)
    for prompt in sorted(range(len(tokens)), key=lambda n: (-tokens[n], n)):
        owners[prompt] = loads.index(min(loads))
        loads[owners[prompt]] += int(tokens[prompt])
    prompts = [n for n, owner in enumerate(owners) if owner == rank]
    nodes = [n for n, node in enumerate(batch.nodes) if owners[node.prompt] == rank]
    prompt_place = {n: place for place, n in enumerate(prompts)}
    node_place = {-1: -1} | {n: place for place, n in enumerate(nodes)}
    return Batch(
        prompts=tuple(batch.prompts[n] for n in prompts),
        nodes=tuple(
            replace(
                batch.nodes[n],
                prompt=prompt_place[batch.nodes[n].prompt],
                parent=node_place[batch.nodes[n].parent],
            )
            for n in nodes
        ),
        z=batch.z,
    )


def _lengths(batch: Batch) -> list[int]:
    return [len(node.token_ids) for node in batch.nodes]
