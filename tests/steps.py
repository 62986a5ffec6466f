"""From hand-made groups to a gradient, as the loop does it; and the plainest scoring there is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from forests import flat_group

from localrl.backend import mx, nn, tree_flatten
from localrl.learning.credit import assign_credit
from localrl.learning.objectives import Objective, denominator, make_objective, weigh_prompt
from localrl.learning.pass_logprobs import PassLogprobs
from localrl.learning.selection import Selection, select
from localrl.learning.update import Updater, global_norm
from localrl.records import Batch, Group, Leaf, MemoryPlan, Node, ScoredGroup
from localrl.settings import LearningConfig

TEMPERATURE = 0.8
LMAX = 40


def plan(micro_rows=3, head_chunk=16):
    return MemoryPlan(
        group_size=4,
        decode_rows=8,
        prefill_rows=8,
        micro_rows=micro_rows,
        head_chunk=head_chunk,
        max_prompt_tokens=64,
        max_completion_tokens=LMAX,
        grad_checkpoint=False,
        dequantise=True,
        threads=None,
        predicted_bytes=None,
        limit_bytes=None,
        reason="",
    )


def ragged_group(lengths: Sequence[int], first_token: int = 4) -> Group:
    """A flat group with completions of these lengths."""
    like = flat_group(len(lengths))
    nodes = tuple(
        Node(
            parent=-1,
            token_ids=np.arange(first_token + 7 * i, first_token + 7 * i + n, dtype=np.int32) % 64,
            sampled=np.ones(n, bool),
            sampled_logprobs=np.full(n, -1.0, np.float32),
            entropies=np.full(n, 0.5, np.float32),
        )
        for i, n in enumerate(lengths)
    )
    leaves = tuple(Leaf(i, "stop", "") for i in range(len(lengths)))
    return Group(like.example, like.prompt_ids, nodes, leaves, len(lengths))


def selection(objective: Objective, groups: Sequence[ScoredGroup]) -> Selection:
    credits = [weigh_prompt(objective, group, assign_credit(group)) for group in groups]
    return select(groups, credits, denominator(objective, groups, credits, LMAX), objective)


def gradient(policy, groups, micro_rows=3, first=None, **learning):
    """(gradient, loss) of one step, through the real update.

    first: the first pass's log-probabilities of every node of all groups, if this is a later pass.
    """
    config = LearningConfig(**learning)
    batch = selection(make_objective(config), groups).batch
    updater = Updater(policy, config, TEMPERATURE)
    known = None if first is None else first_pass(batch, first)
    found, total = updater.gradient(batch, plan(micro_rows), known)
    return found, total.loss / batch.z


def first_pass(batch: Batch, logprobs: Sequence[np.ndarray]) -> PassLogprobs:
    """The record of a pass that found these log-probabilities of the nodes' tokens."""
    pairs = zip(batch.nodes, logprobs, strict=True)
    return PassLogprobs({n: values[node.trained] for n, (node, values) in enumerate(pairs)})


def plain_logprobs(model, groups: Sequence[ScoredGroup]) -> mx.array:
    """Log-probabilities of all completions' tokens, each completion alone with whole logits."""
    found = []
    for group in groups:
        prompt = list(group.group.prompt_ids)
        for completion in group.group.completions():
            tokens = completion.token_ids.tolist()
            logits = model(mx.array([prompt + tokens]))[0].astype(mx.float32) / TEMPERATURE
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            places = range(len(prompt) - 1, len(prompt) - 1 + len(tokens))
            found.append(logprobs[mx.array(list(places)), mx.array(tokens)])
    return mx.concatenate(found)


def pulled_back(policy, groups, derivative: np.ndarray):
    """The adapters' gradient of a loss, from its derivative by each token's log-probability."""
    weights = mx.array(derivative.astype(np.float32))

    def loss():
        return (weights * plain_logprobs(policy.model, groups)).sum()

    return nn.value_and_grad(policy.model, loss)()[1]


def relative_difference(a, b):
    flat_a, flat_b = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert flat_a.keys() == flat_b.keys()
    difference = global_norm({name: flat_a[name] - flat_b[name] for name in flat_a})
    return difference / global_norm(flat_b)
