"""The records that travel along the loop: plain, frozen, and free of MLX.

T is the number of tokens of a completion, n of a node. Log-probabilities and entropies are in nats,
lengths in tokens, memory in bytes, times in seconds. Token ids are the truth: text is decoded once
for rewards and people and is never encoded back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class RewardSpec:
    """A reward function by its import path, so that a spawned child can load it by itself."""

    name: str
    """Of its metrics."""
    target: str
    """`module:function`, see `Worker.call`."""
    weight: float = 1.0


ENVIRONMENT_LOOKUP = "localrl.tasks.environment_child:instances"
"""What gives a worker's child the environments that completions talk to, by `Leaf.conversation`."""

FinishReason = Literal["stop", "closed", "length", "loop", "turns", "error"]
"""Why a completion ended: its end token, the stop text, the longest length, repetition, the last
turn of an environment, a failure."""

DropReason = Literal["no reward", "no coefficient", "down-sampled"]
"""Why a completion is not trained."""


@dataclass(frozen=True)
class Example:
    """One problem of a task, before it is rendered to tokens."""

    id: str
    """Stable across runs and machines; unique within a task."""
    messages: tuple[Mapping[str, str], ...]
    """Chat messages, each with `role` and `content`."""
    answer: Any = None
    """The gold answer that rewards compare with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the row; reaches the reward functions by name."""
    as_text: bool = False
    """Whether the prompt came as text: reward functions then get prompts and completions as text,
    as TRL gives them, and not as chat messages."""
    tracker_key: str = ""
    """What the tracker counts under: the id, or family/difficulty for endless tasks."""

    def __post_init__(self) -> None:
        if not self.tracker_key:
            object.__setattr__(self, "tracker_key", self.id)


@dataclass(frozen=True, eq=False)
class Node:
    """A run of tokens with one parent; it stores only the tokens it adds."""

    parent: int
    """Index of the parent node in the group, -1 for a root. Parents come before children."""
    token_ids: np.ndarray
    """(n,) int32."""
    sampled: np.ndarray
    """(n,) bool; false for tokens that the model did not write (tools, turns)."""
    sampled_logprobs: np.ndarray
    """(n,) float32, under the distribution really sampled from; 0 where not sampled."""
    entropies: np.ndarray
    """(n,) float32, of that whole distribution; 0 where not sampled."""
    cond_weight: float = 1.0
    """1/B for one of B siblings drawn alike, 1/s for a survivor of pruning."""
    version: int = 0
    """Number of policy updates made before these tokens were sampled."""
    round: int = 0
    """Of a root: the round in which it was asked for. Whether later rounds come depends on it."""
    old_logprobs: np.ndarray | None = None
    """(n,) float32, under the policy at the start of this step, for tokens that an earlier policy
    sampled; None for fresh ones, where it would be `sampled_logprobs`."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        lengths = (len(self.sampled), len(self.sampled_logprobs), len(self.entropies))
        if lengths != (n, n, n):
            raise ValueError(f"Node with {n} tokens has fields of lengths {lengths}")


@dataclass(frozen=True)
class Leaf:
    """The end of one completion."""

    node: int
    finish_reason: FinishReason
    text: str
    """Decoded completion without the end token; of several turns the last one's. For rewards and
    people only."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The completion of an example with an environment as chat messages; empty for others."""
    conversation: int | None = None
    """Which environment it talked to: a number that only `tasks.environments` understands."""


@dataclass(frozen=True)
class Completion:
    """Read-only view of one root-to-leaf path; each array is (T,), as in `Node`."""

    token_ids: np.ndarray
    sampled: np.ndarray
    sampled_logprobs: np.ndarray
    entropies: np.ndarray
    finish_reason: FinishReason
    text: str

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt: a forest of nodes. A flat group is a forest without forks."""

    example: Example
    prompt_ids: tuple[int, ...]
    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]
    planned_roots: int
    """Roots that were asked for; weights divide by it, so that stopping early stays unbiased."""

    def path(self, node: int) -> list[int]:
        """Indices of the nodes from the root down to `node`."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def completion(self, leaf: int) -> Completion:
        """The completion that ends in the leaf with this index."""
        end = self.leaves[leaf]
        nodes = [self.nodes[i] for i in self.path(end.node)]
        return Completion(
            token_ids=np.concatenate([node.token_ids for node in nodes]),
            sampled=np.concatenate([node.sampled for node in nodes]),
            sampled_logprobs=np.concatenate([node.sampled_logprobs for node in nodes]),
            entropies=np.concatenate([node.entropies for node in nodes]),
            finish_reason=end.finish_reason,
            text=end.text,
        )

    def completions(self) -> Iterator[Completion]:
        """The completions of all leaves, in leaf order."""
        return (self.completion(i) for i in range(len(self.leaves)))


@dataclass(frozen=True)
class ModelTurn:
    """A completion whose turn has come to an end, on its way to its environment."""

    example: Example
    conversation: int | None
    """None when this was its first turn. Where paths have forked, several have the same one."""
    token_ids: tuple[int, ...]
    """Of this turn, the end token included."""
    text: str
    """Of this turn, without the end token."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class EnvironmentReply:
    """What an environment made of a turn."""

    conversation: int
    """From now on this completion's own."""
    messages: tuple[Mapping[str, Any], ...]
    """The turn and what was answered to it, as chat messages."""
    token_ids: tuple[int, ...] = ()
    """What stands between this turn and the next one; empty when there is no next one."""
    failed: bool = False
    """The environment broke: the completion has no reward."""

    @property
    def over(self) -> bool:
        """Whether the conversation has come to its end."""
        return not self.token_ids


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards."""

    group: Group
    rewards: tuple[float | None, ...]
    """One per leaf: the weighted sum of the parts. None when no part gave a number, and then
    the leaf is left out of every baseline and teaches nothing."""
    parts: Mapping[str, tuple[float | None, ...]]
    """Unweighted reward of each leaf by reward function; None is "not applicable" or "failed"."""


@dataclass(frozen=True, eq=False)
class BatchNode:
    """A node on its way to the optimizer: tokens, and one coefficient for each."""

    prompt: int
    """Index into `Batch.prompts`."""
    parent: int
    """Index into `Batch.nodes`, -1 for a root. Parents come before children."""
    token_ids: np.ndarray
    """(n,) int32."""
    coefficients: np.ndarray
    """(n,) float32: share times advantage; 0 where the model did not write the token."""
    anchor_logprobs: np.ndarray
    """(n,) float32, the anchor of the ratio: the sampler's for fresh tokens, those of the policy
    at the start of the step for tokens that an earlier policy sampled."""
    finish: bool
    """True when a completion ends here."""
    kl_weights: np.ndarray
    """(n,) float32: kl_coef times share; 0 where the model did not write the token."""

    @property
    def trained(self) -> np.ndarray:
        """(n,) bool: the tokens that have something to teach."""
        return (self.coefficients != 0) | (self.kl_weights != 0)


@dataclass(frozen=True)
class Batch:
    """All that the update sees of one step: tokens, structure, one coefficient per token, Z."""

    prompts: tuple[tuple[int, ...], ...]
    nodes: tuple[BatchNode, ...]
    z: float
    """The one denominator: by default prompts of the step times the *configured*
    max_completion_tokens. See `localrl.learning.objectives.denominator`."""


@dataclass(frozen=True)
class MemoryPlan:
    """What rollouts and update may use: plain numbers, made before the run."""

    group_size: int
    decode_rows: int
    """Sequences decoded at once."""
    prefill_rows: int
    """Prompts prefilled at once."""
    micro_rows: int
    """Sequences in one backward pass."""
    head_chunk: int
    """Positions whose logits exist at once in the update."""
    max_prompt_tokens: int
    """Of the prompts that the sizes are for; a longer one that is allowed changes the plan."""
    max_completion_tokens: int
    grad_checkpoint: bool
    dequantise: bool
    """Keep the frozen base as float32 matrices (the CPU's fast path)."""
    threads: int | None
    predicted_bytes: int | None
    """None: not estimated."""
    limit_bytes: int | None
    reason: str
    measured: bool = False
    """Whether the prediction rests on measurements of this machine and model."""


@dataclass(frozen=True)
class StepStats:
    """What one update did, summed over its micro-batches; None where there was no update."""

    loss: float | None
    grad_norm: float | None
    clipped_low: float | None
    """Share of trained tokens whose ratio was held at 1 - clip_low."""
    clipped_high: float | None
    logprob_gap_mean: float | None
    """Mean |new - sampled| log-probability before the first update of the step."""
    logprob_gap_max: float | None
    kl: float | None
    """Mean KL to the model without adapters, weighted as in the loss; None without a KL term."""
    drift: float | None
    """Mean |change of log-probability| that the step made, in nats, over some trained tokens."""
    trained_tokens: int
    saved_positions: int
    """Positions not computed again because completions share them, the prompt's included."""
    updated: bool
    problem: str | None = None
    """Why an update was not made, or was taken back: something was not finite."""
    relative_size: float | None = None
    """What the adapters add to the weights, as a share of their size: see `policy.size`."""


def mean_or_none(values: Sequence[float]) -> float | None:
    """Mean of the values, or None when there are none: no number is invented."""
    return float(np.mean(values)) if len(values) else None
