"""Flat groups: G completions of each prompt, drawn independently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrl.policy.model import Policy
from localrl.records import Example, Group, Leaf, Node
from localrl.rollouts.decode import Decoder, Request, Sampled
from localrl.rollouts.keys import keyed_uniforms


def sample_groups(
    decoder: Decoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    *,
    group_size: int,
    max_completion_tokens: int,
    seed: int,
    step: int,
    version: int,
) -> list[Group]:
    """`group_size` completions of every example, all decoded as one batch.

    `prompts` holds the examples' token ids. A completion depends on (seed, step, example, its
    number in the group) and the policy, not on what else is in the batch.
    """
    requests = [
        Request(p, keyed_uniforms(max_completion_tokens, seed, step, example.id, n))
        for p, example in enumerate(examples)
        for n in range(group_size)
    ]
    sampled = decoder.decode(prompts, requests)
    return [
        _group(
            decoder.policy,
            example,
            prompts[p],
            sampled[p * group_size : (p + 1) * group_size],
            version,
        )
        for p, example in enumerate(examples)
    ]


def _group(
    policy: Policy,
    example: Example,
    prompt_ids: tuple[int, ...],
    sampled: Sequence[Sampled],
    version: int,
) -> Group:
    texts = [policy.tokenizer.decode(_body(completion)) for completion in sampled]
    return Group(
        example=example,
        prompt_ids=prompt_ids,
        nodes=tuple(_root(completion, version) for completion in sampled),
        leaves=tuple(
            Leaf(i, "stop" if completion.stopped else "length", texts[i])
            for i, completion in enumerate(sampled)
        ),
        planned_roots=len(sampled),
    )


def _root(completion: Sampled, version: int) -> Node:
    return Node(
        parent=-1,
        token_ids=completion.token_ids,
        sampled=np.ones(len(completion.token_ids), bool),
        sampled_logprobs=completion.logprobs,
        entropies=completion.entropies,
        version=version,
    )


def _body(completion: Sampled) -> list[int]:
    ids = completion.token_ids.tolist()
    return ids[:-1] if completion.stopped else ids
