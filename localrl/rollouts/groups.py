"""Groups of completions: flat groups, and trees whose paths fork during decoding.

A flat group is a tree without forks: it uses the same code and the same random draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from localrl.errors import ConfigError
from localrl.policy.model import Policy
from localrl.records import Example, Group, ScoredGroup
from localrl.rollouts.agents import AgentTurns, common_prompt, run_agents
from localrl.rollouts.batch import Segment, TreeRequest, end_leaf
from localrl.rollouts.decode import Decoder, ForkRule
from localrl.rollouts.reuse import Prefix, place_tails, tail_requests, with_reused
from localrl.rollouts.turns import Turns, run_turns
from localrl.settings import RolloutConfig


@dataclass(frozen=True)
class Shape:
    """The number of roots, leaves and rounds sampled for one prompt."""

    roots: int
    """Independent roots in a round."""
    leaves: int
    """Maximum completions of a round: more than its roots if they may fork."""
    rounds: int = 1
    """Maximum number of rounds."""

    @property
    def planned_roots(self) -> int:
        """The divisor of the weights, regardless of how many roots are sampled."""
        return self.roots * self.rounds


ONE = Shape(roots=1, leaves=1)
"""A single completion."""

ROUND = 2
"""Completions of a round."""
ROOTS = 2
"""Independent roots of a tree."""


def make_shape(config: RolloutConfig) -> Shape:
    """Return the shape of the configured strategy.

    Raises: ConfigError if the settings are inconsistent.
    """
    size = config.completions
    if config.strategy == "flat":
        return Shape(size, size)
    if config.strategy == "tree":
        if size < ROOTS:
            raise ConfigError(
                f"rollout.group_size is {size}, but a tree has {ROOTS} independent roots. Raise it."
            )
        return Shape(ROOTS, size)
    if size % ROUND:
        raise ConfigError(
            f"rollout.group_size is {size}, which rounds of {ROUND} completions cannot divide "
            "evenly. Make it even."
        )
    return Shape(ROUND, ROUND, size // ROUND)


def sample_groups(
    decoder: Decoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    shape: Shape,
    *,
    rule: ForkRule | None,
    max_completion_tokens: int,
    seed: int,
    step: int,
    version: int,
    round: int = 0,
    expected_tokens: Sequence[float | None] = (),
    begun: Sequence[Sequence[Prefix]] = (),
    turns: Turns | AgentTurns | None = None,
) -> list[Group]:
    """Sample a group for every example, or one round of it, all decoded as one batch.

    `prompts` holds the examples' token ids. A draw depends on (seed, step, example, place in the
    tree) and the policy, not on the rest of the batch; on a GPU the policy's own rounding may, as
    kernels differ by the number of rows. Roots are numbered across rounds.
    `expected_tokens` is the expected completion length for each example. Each prefix in `begun`
    replaces one root of its example, at most all of them. With `turns`, completions continue after
    their environment has replied, see `run_turns`; or agents make their prompts, see `run_agents`.
    """
    if isinstance(turns, AgentTurns):
        return run_agents(
            decoder,
            examples,
            turns,
            roots=shape.roots,
            planned_roots=shape.planned_roots,
            max_completion_tokens=max_completion_tokens,
            seed=seed,
            step=step,
            version=version,
            round=round,
        )
    begun = begun or [()] * len(examples)
    expected = expected_tokens or [None] * len(examples)
    requests = [
        TreeRequest(
            prompt=p,
            address=(seed, step, example.id),
            roots=shape.roots - len(begun[p]),
            leaves=shape.leaves - len(begun[p]),
            max_tokens=max_completion_tokens,
            first_root=round * shape.roots,
            expected_tokens=expected[p],
            example=example,
        )
        for p, example in enumerate(examples)
    ]
    places, tails = tail_requests(
        examples, prompts, begun, max_completion_tokens=max_completion_tokens, seed=seed, step=step
    )
    segments = decoder.decode([*prompts, *places], requests + tails, rule)
    trees: list[list[int]] = [[] for _ in requests + tails]
    for index, segment in enumerate(segments):
        trees[segment.tree].append(index)
    planned = shape.planned_roots
    groups = [
        _group(decoder.policy, example, prompt, segments, tree, version, planned, round)
        for example, prompt, tree in zip(examples, prompts, trees, strict=False)
    ]
    ends = place_tails(begun, [segments[tree[0]] for tree in trees[len(requests) :]])
    tokenizer = decoder.policy.tokenizer
    groups = [
        with_reused(*each, tokenizer=tokenizer, version=version)
        for each in zip(groups, begun, ends, strict=True)
    ]
    if turns is None:
        return groups
    return run_turns(
        decoder,
        groups,
        turns,
        rule=rule,
        leaves=shape.leaves,
        max_completion_tokens=max_completion_tokens,
        address=(seed, step, round),
        version=version,
    )


def join(first: ScoredGroup, second: ScoredGroup) -> ScoredGroup:
    """Merge two groups of one prompt; the second group's roots follow the first group's."""
    one, two = common_prompt([first.group, second.group])
    offset = len(one.nodes)
    nodes = [
        replace(node, parent=node.parent + offset if node.parent >= 0 else -1) for node in two.nodes
    ]
    leaves = [
        replace(leaf, node=leaf.node + offset, beside=tuple(n + offset for n in leaf.beside))
        for leaf in two.leaves
    ]
    group = replace(one, nodes=(*one.nodes, *nodes), leaves=(*one.leaves, *leaves))
    parts = {name: (*values, *second.parts[name]) for name, values in first.parts.items()}
    return ScoredGroup(group, (*first.rewards, *second.rewards), parts)


def _group(
    policy: Policy,
    example: Example,
    prompt_ids: tuple[int, ...],
    segments: Sequence[Segment],
    tree: Sequence[int],
    version: int,
    planned_roots: int,
    round: int,
) -> Group:
    """Build the record of one tree from the segments with the indices in `tree`."""
    places = {index: place for place, index in enumerate(tree)}
    nodes = tuple(
        segments[i].node(places.get(segments[i].parent, -1), version, round) for i in tree
    )
    group = Group(example, prompt_ids, nodes, (), planned_roots)
    leaves = []
    for place, index in enumerate(tree):
        reason = segments[index].end
        if reason != "fork":
            ids = [int(t) for n in group.path(place) for t in nodes[n].token_ids]
            leaves.append(end_leaf(place, ids, reason, policy.tokenizer))
    return Group(example, prompt_ids, nodes, tuple(leaves), planned_roots)
