"""Groups of completions: flat ones, and trees whose paths fork while they are written.

A flat group is a tree without forks: the same code, the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrl.policy.model import Policy
from localrl.records import Example, Group, Leaf, Node
from localrl.rollouts.batch import Segment, TreeRequest
from localrl.rollouts.decode import Decoder, ForkRule


def sample_groups(
    decoder: Decoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    *,
    roots: int,
    group_size: int,
    rule: ForkRule | None,
    max_completion_tokens: int,
    seed: int,
    step: int,
    version: int,
) -> list[Group]:
    """A group of every example, all decoded as one batch.

    `prompts` holds the examples' token ids. A group has `roots` independent beginnings and, through
    the rule's forks, at most `group_size` completions; without a rule the two are the same.
    A draw depends on (seed, step, example, place in the tree) and the policy, not on what else is
    in the batch.
    """
    requests = [
        TreeRequest(p, (seed, step, example.id), roots, group_size, max_completion_tokens)
        for p, example in enumerate(examples)
    ]
    trees: list[list[int]] = [[] for _ in requests]
    segments = decoder.decode(prompts, requests, rule)
    for index, segment in enumerate(segments):
        trees[segment.tree].append(index)
    return [
        _group(decoder.policy, example, prompt, segments, tree, version, roots)
        for example, prompt, tree in zip(examples, prompts, trees, strict=True)
    ]


def _group(
    policy: Policy,
    example: Example,
    prompt_ids: tuple[int, ...],
    segments: Sequence[Segment],
    tree: Sequence[int],
    version: int,
    planned_roots: int,
) -> Group:
    """The record of one tree, whose segments have the numbers in `tree`."""
    places = {index: place for place, index in enumerate(tree)}
    nodes = tuple(_node(segments[i], places.get(segments[i].parent, -1), version) for i in tree)
    group = Group(example, prompt_ids, nodes, (), planned_roots)
    leaves = []
    for place, index in enumerate(tree):
        reason = segments[index].end
        if reason != "fork":
            ids = [int(t) for n in group.path(place) for t in nodes[n].token_ids]
            body = ids[:-1] if reason == "stop" else ids
            leaves.append(Leaf(place, reason, policy.tokenizer.decode(body)))
    return Group(example, prompt_ids, nodes, tuple(leaves), planned_roots)


def _node(segment: Segment, parent: int, version: int) -> Node:
    return Node(
        parent=parent,
        token_ids=segment.token_ids,
        sampled=np.ones(len(segment.token_ids), bool),
        sampled_logprobs=segment.logprobs,
        entropies=segment.entropies,
        cond_weight=1 / segment.siblings,
        version=version,
    )
