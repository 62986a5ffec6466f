"""Completions that begin with a prefix of an earlier one, so that about half of them succeed.

Prefix sampling (Zhu et al. 2026, arXiv 2605.05112) begins completions of a hard prompt with a part
of one that succeeded, those of an easy prompt with a part of one that failed. Here the expected
reward p of a prompt is the tracker's, and a prefix of share f of a completion is taken to be worth

    V = p + f (1 - p) after a success,      V = p (1 - f) after a failure:

a line from the prompt's own p to the known end. V is one half at f = (1 - 2p) / (2 - 2p) of a
success and f = (2p - 1) / 2p of a failure. From a prompt's second visit on, one of its completions
begins so; the others are drawn from the prompt, and the tracker learns from these alone. Tokens of
a prefix are read, not generated.

`Prefixes` does what the paper does: the prefix is context, trained on is what follows. Its gradient
is that of the mean of the expected reward from the prompt and from the stored state,

    J'(theta) = (1 - s) E[R | prompt] + s E[R | prompt, prefix],    s: share of such completions

which is not J: states that successes (or failures) went through count for more than the policy
visits them. `WeightedPrefixes` estimates the gradient of J itself. The completion to begin with is
drawn with probability q_i among the m fresh ones of the last visit and has the weight 1 / (m q_i);
its prefix has a length chosen from what was expected before it was drawn; and its tokens are stale
tokens as those of `rollout.reuse`, trained with the new outcome and their importance weights (which
are truncated, so that what is exact for an unchanged policy is nearly so for one that moves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from rivals import instead

from localrl.learning.credit import Credit
from localrl.learning.tracker import Tracker
from localrl.records import Example, Group, Leaf, Node, ScoredGroup
from localrl.rollouts.reuse import Prefix
from localrl.training.sampler import Sampler
from localrl.training.session import Session
from localrl.utils.rng import keyed_uniforms

LEAST_TOKENS = 2
"""Shortest prefix worth reading."""
LEAST_SPREAD = 0.1
"""Least standard deviation of the reward assumed of a prefix, which bounds the weights."""


def with_prefixes(session: Session, kind: type[Prefixes]) -> Session:
    """Return the session with the stage, and a tracker that learns from whole completions."""
    tracker = instead(WholeTracker, session.tracker)
    session.sampler = instead(kind, session.sampler)
    session.tracker = session.sampler.tracker = tracker
    return session


# Prefixes


def half_way(p: float) -> float:
    """Return the share of a success (p < 1/2) or failure after which V is one half."""
    return (1 - 2 * p) / (2 - 2 * p) if p < 0.5 else (2 * p - 1) / (2 * p)


def worth(p: float, share: float, succeeded: bool) -> float:
    """Return V after this share of a completion."""
    return p + share * (1 - p) if succeeded else p * (1 - share)


@dataclass(frozen=True, eq=False)
class Stored:
    """A completion of an earlier visit, drawn from the prompt."""

    node: Node
    leaf: Leaf
    reward: float
    """Placed between 0 and 1."""


@dataclass(frozen=True)
class Visit:
    """The fresh completions of a prompt's last visit."""

    prompt_ids: tuple[int, ...]
    completions: tuple[Stored, ...]
    expected: float
    """Reward expected before they were drawn, between 0 and 1."""
    tokens: float
    """Length expected before they were drawn."""


@dataclass(frozen=True)
class Begun:
    """What a completion of this step begins with."""

    prefix: Prefix
    worth: float
    """Its V, a baseline for what follows."""
    weight: float = 1.0


@dataclass(eq=False)
class Prefixes(Sampler):
    """One completion of each prompt begins with a prefix; the prefix is context."""

    visits: dict[str, Visit] = field(default_factory=dict)
    """By example id."""
    _before: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Reward and length that were expected of the prompts of this step."""
    _begun: dict[str, Begun] = field(default_factory=dict)

    def begin(
        self, step: int, examples: Sequence[Example], prompts: Sequence[tuple[int, ...]]
    ) -> list[Sequence[Prefix]]:
        """Return at most one prefix for each example."""
        keys = {example.id: example.tracker_key for example in examples}
        self._before = {
            name: (self._expected(key), self.tracker.expected_tokens(key) or 0.0)
            for name, key in keys.items()
        }
        self._begun = {}
        for example, prompt in zip(examples, prompts, strict=True):
            visit = self.visits.get(example.id)
            if visit is not None and visit.prompt_ids == prompt:
                begun = self.draw(example, visit, step)
                if begun is not None:
                    self._begun[example.id] = begun
        return [[self._begun[e.id].prefix] if e.id in self._begun else () for e in examples]

    def _expected(self, key: str) -> float:
        """Return the expected reward within the range of rewards, 0 to 1; 0 if unknown."""
        value = self.tracker.value(key)
        return 0.0 if value is None else self.tracker.place(value)

    def draw(self, example: Example, visit: Visit, step: int) -> Begun | None:
        """Return a prefix of the newest completion with the outcome that is needed, if any."""
        p, _ = self._before[example.id]
        fitting = [c for c in visit.completions if (c.reward > 0.5) == (p < 0.5)]
        if not fitting:
            return None
        node, share = fitting[-1].node, half_way(p)
        length = round(share * len(node.token_ids))
        if length < LEAST_TOKENS:
            return None
        return Begun(_prefix(node, length), worth(p, share, p < 0.5))

    def marked(self, group: Group, begun: Begun) -> Group:
        """Return the group with the prefix as context, and V as what was expected."""

        def context(node: Node) -> Node:
            nothing = np.zeros(len(node.token_ids), np.float32)
            return replace(
                node,
                sampled=nothing.astype(bool),
                sampled_logprobs=nothing,
                entropies=nothing,
                old_logprobs=None,
                expected_reward=begun.worth,
            )

        nodes = (node if node.old_logprobs is None else context(node) for node in group.nodes)
        return replace(group, nodes=tuple(nodes))

    def learn(self, scored: Sequence[ScoredGroup]) -> None:
        """Store the fresh completions of a step; a visit without any keeps the one before."""
        super().learn(scored)
        for group in scored:
            example = group.group.example
            fresh = [
                Stored(group.group.nodes[leaf.node], leaf, self.tracker.place(reward))
                for leaf, reward in zip(group.group.leaves, group.rewards, strict=True)
                if reward is not None and whole(group.group, leaf)
            ]
            if fresh and example.id in self._before:
                before = self._before[example.id]
                self.visits[example.id] = Visit(group.group.prompt_ids, tuple(fresh), *before)

    def _collect(self, step: int, examples: Sequence[Example], version: int) -> list[ScoredGroup]:
        found = super()._collect(step, examples, version)
        return [
            replace(one, group=self.marked(one.group, self._begun[name]))
            if (name := one.group.example.id) in self._begun
            else one
            for one in found
        ]


@dataclass(eq=False)
class WeightedPrefixes(Prefixes):
    """The same without bias: which completion is begun with is weighted, and its prefix trained."""

    def draw(self, example: Example, visit: Visit, step: int) -> Begun | None:
        """Draw a completion in proportion to the spread of outcomes after its prefix."""
        length = round(half_way(visit.expected) * visit.tokens)
        if length < LEAST_TOKENS:
            return None
        spreads = [_spread(visit, stored, length) for stored in visit.completions]
        chances = np.array(spreads) / sum(spreads)
        uniform = float(keyed_uniforms(1, self.config.run.seed, step, example.id, "begin")[0])
        drawn = min(int(np.searchsorted(np.cumsum(chances), uniform)), len(chances) - 1)
        stored = visit.completions[drawn]
        prefix = self._stale(example, visit, stored, length)
        return Begun(prefix, visit.expected, float(1 / (len(chances) * chances[drawn])))

    def marked(self, group: Group, begun: Begun) -> Group:
        """Return the group with the weight of the completion that begins with the prefix."""
        nodes = (
            node if node.old_logprobs is None else replace(node, cond_weight=begun.weight)
            for node in group.nodes
        )
        return replace(group, nodes=tuple(nodes))

    def _stale(self, example: Example, visit: Visit, stored: Stored, length: int) -> Prefix:
        """Return the prefix with its log-probabilities under the present policy."""
        most = self.plan.max_completion_tokens
        ended = length >= len(stored.node.token_ids)
        length = len(stored.node.token_ids) if ended else min(length, most - 1)
        group = Group(example, visit.prompt_ids, (stored.node,), (replace(stored.leaf, node=0),), 1)
        [[now]] = self._now([group])
        reason = stored.leaf.finish_reason if ended else None
        return replace(
            _prefix(stored.node, length), old_logprobs=now[:length], finish_reason=reason
        )


def _spread(visit: Visit, stored: Stored, length: int) -> float:
    """Return the standard deviation of the outcome after so many tokens of a completion."""
    share = min(length / len(stored.node.token_ids), 1.0)
    value = worth(visit.expected, share, stored.reward > 0.5)
    return max(LEAST_SPREAD, (value * (1 - value)) ** 0.5)


def _prefix(node: Node, length: int) -> Prefix:
    return Prefix(
        token_ids=node.token_ids[:length],
        sampled_logprobs=node.sampled_logprobs[:length],
        entropies=node.entropies[:length],
        version=node.version,
        old_logprobs=node.sampled_logprobs[:length],
        finish_reason=None,
        expected_reward=node.expected_reward,
    )


# The tracker


@dataclass
class WholeTracker(Tracker):
    """A tracker that learns from the completions that were drawn from the prompt."""

    def update(self, scored: Sequence[ScoredGroup], credits: Sequence[Credit]) -> None:
        """Add the rewards of whole completions."""
        pairs = [_whole_only(*pair) for pair in zip(scored, credits, strict=True)]
        super().update([group for group, _ in pairs], [credit for _, credit in pairs])


def whole(group: Group, leaf: Leaf) -> bool:
    """Return True if a completion was drawn from the prompt in one piece, by this step's policy."""
    node = group.nodes[leaf.node]
    return node.parent < 0 and node.old_logprobs is None and bool(node.sampled.all())


def _whole_only(scored: ScoredGroup, credit: Credit) -> tuple[ScoredGroup, Credit]:
    """Return the group without completions that begin with a prefix."""
    group = scored.group
    kept = [i for i, leaf in enumerate(group.leaves) if whole(group, leaf)]
    if len(kept) == len(group.leaves):
        return scored, credit
    places = [group.leaves[i].node for i in kept]
    nodes = tuple(group.nodes[n] for n in places)
    leaves = tuple(replace(group.leaves[i], node=n) for n, i in enumerate(kept))
    few = replace(scored, rewards=tuple(scored.rewards[i] for i in kept), parts={})
    advantages = tuple(credit.advantages[n] for n in places)
    return (
        replace(few, group=replace(group, nodes=nodes, leaves=leaves)),
        Credit(advantages, tuple(credit.weights[n] for n in places)),
    )


STAGES: Mapping[str, type[Prefixes]] = {
    "prefixes": Prefixes,
    "weighted prefixes": WeightedPrefixes,
}
