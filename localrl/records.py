"""The records passed along the loop: plain, frozen, and free of MLX.

T is the number of tokens of a completion, n of a node. Log-probabilities and entropies are in nats,
lengths in tokens, memory in bytes, times in seconds. Token ids are the truth: text is decoded once
for rewards and people, and is never encoded back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class RewardSpec:
    """A reward function given by import path, so that a spawned child can load it."""

    name: str
    """Name used in metric keys, e.g. rewards/<name>/mean."""
    target: str
    """Import path `module:function`, see `Worker.call`."""
    weight: float = 1.0
    seconds_each: float | None = None
    """Seconds allowed for each completion of a call; None: the worker's limit for all."""


ENVIRONMENT_LOOKUP = "localrl.tasks.environment_child:instances"
"""Function in a worker's child that returns its environments, by `Leaf.conversation`."""

FinishReason = Literal["stop", "closed", "decided", "length", "loop", "turns", "error"]
"""Reasons a completion ended: end token, stop text, decided outcome, maximum length, repetition,
last turn of an environment, failure."""

DropReason = Literal["no reward", "no coefficient", "truncated"]
"""Reasons a completion is not trained on."""


@dataclass(frozen=True)
class Example:
    """One problem of a task, before it is rendered to tokens."""

    id: str
    """Identifier, stable across runs and machines; unique within a task."""
    messages: tuple[Mapping[str, Any], ...]
    """Chat messages, each with `role` and mostly `content`. If the last is the assistant's, it is
    the beginning of a turn that the model continues."""
    answer: Any = None
    """Gold answer that rewards compare with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the row; passed to reward functions by name."""
    as_text: bool = False
    """True if the prompt was given as text: reward functions then get prompts and completions as
    text, as in TRL, not as chat messages."""
    tracker_key: str = ""
    """Key under which the tracker counts: the id, or family/difficulty for endless tasks."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of functions, which the chat template shows to the model."""
    place: str = field(default="", compare=False)
    """Place of the row in the user's data, for messages: `file, line n`."""

    def __post_init__(self) -> None:
        if not self.tracker_key:
            object.__setattr__(self, "tracker_key", self.id)

    @property
    def begun(self) -> str:
        """The beginning of the model's turn that the prompt gives; empty if it gives none."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""


@dataclass(frozen=True, eq=False)
class Node:
    """A run of tokens with one parent; it stores only the tokens it adds."""

    parent: int
    """Index of the parent node in the group, -1 for a root. Parents come before children."""
    token_ids: np.ndarray
    """(n,) int32."""
    sampled: np.ndarray
    """(n,) bool; False for tokens that the model did not write (tools, turns)."""
    sampled_logprobs: np.ndarray
    """(n,) float32, under the distribution actually sampled from; 0 where not sampled."""
    entropies: np.ndarray
    """(n,) float32, of that whole distribution; 0 where not sampled."""
    cond_weight: float = 1.0
    """Weight: 1/B for one of B siblings drawn alike, 1/s for a survivor of pruning; 0 for a root
    beside its completion, see `Leaf.beside`."""
    version: int = 0
    """Number of policy updates made before these tokens were sampled."""
    round: int = 0
    """Round in which a root was requested. Later rounds depend on its outcome."""
    old_logprobs: np.ndarray | None = None
    """(n,) float32, under the policy at the start of this step, for tokens that an earlier policy
    sampled; None for fresh ones."""
    scored_logprobs: np.ndarray | None = None
    """(n,) float32, under the policy that sampled the tokens, in a forward pass as the update makes
    it; only where that differs from `sampled_logprobs` by 16-bit rounding and the group may be kept
    for later steps, else None."""
    expected_reward: float | None = None
    """Reward that the tracker expected of the prompt before these tokens were drawn, so that it had
    learned nothing from them. Only roots have it, and none if the tracker had seen no reward."""

    @property
    def written_logprobs(self) -> np.ndarray:
        """(n,) log-probabilities under the policy that sampled the tokens, for comparison with a
        forward pass of a later one."""
        return self.sampled_logprobs if self.scored_logprobs is None else self.scored_logprobs

    @property
    def rounding(self) -> np.ndarray | None:
        """(n,) differences between that pass and the sampler, 0 where not sampled; None without
        the pass."""
        if self.scored_logprobs is None:
            return None
        return np.where(self.sampled, self.scored_logprobs - self.sampled_logprobs, 0.0)

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        lengths = (len(self.sampled), len(self.sampled_logprobs), len(self.entropies))
        if lengths != (n, n, n):
            raise ValueError(f"Node with {n} tokens has fields of lengths {lengths}")


@dataclass(frozen=True)
class Leaf:
    """The last node of one completion, with its text."""

    node: int
    finish_reason: FinishReason
    text: str
    """Decoded completion without the end token, of the last turn if there are several; only for
    rewards and people."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The completion as chat messages, if its example has an environment; else empty."""
    conversation: int | None = None
    """Number of its environment or agent; only `tasks.environments` and `agents` interpret it."""
    beside: tuple[int, ...] = ()
    """Last nodes of the other sequences that an agent had the model write for this completion, each
    with a root of its own, whose `cond_weight` is 0: they take the completion's credit."""


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
    """Number of roots planned; weights divide by it, so that stopping early stays unbiased."""

    def path(self, node: int) -> list[int]:
        """Return the indices of the nodes from the root down to `node`."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def nodes_of(self, leaf: Leaf) -> list[int]:
        """Return the indices of all nodes of a completion, those of its other sequences last."""
        return [n for end in (leaf.node, *leaf.beside) for n in self.path(end)]

    def completion(self, leaf: int) -> Completion:
        """Return the completion that ends in the leaf with this index."""
        end = self.leaves[leaf]
        nodes = [self.nodes[i] for i in self.nodes_of(end)]
        return Completion(
            token_ids=np.concatenate([node.token_ids for node in nodes]),
            sampled=np.concatenate([node.sampled for node in nodes]),
            sampled_logprobs=np.concatenate([node.sampled_logprobs for node in nodes]),
            entropies=np.concatenate([node.entropies for node in nodes]),
            finish_reason=end.finish_reason,
            text=end.text,
        )

    def completions(self) -> Iterator[Completion]:
        """Iterate over the completions of all leaves, in leaf order."""
        return (self.completion(i) for i in range(len(self.leaves)))


@dataclass(frozen=True)
class ModelTurn:
    """A finished turn of the model, sent to its environment."""

    example: Example
    conversation: int | None
    """Number of its environment; None after the first turn. Forked paths share one number."""
    token_ids: tuple[int, ...]
    """Token ids of this turn, including the end token."""
    text: str
    """Text of this turn, without the end token."""
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    """Log-probability of each token as sampled; only agents are told."""


@dataclass(frozen=True)
class AgentCall:
    """An agent's call for a turn of the model."""

    conversation: int
    """Number of the agent, one for each completion."""
    prompt: tuple[int, ...]
    """Everything that the model reads."""
    continues: int | None
    """Number of the completion's sequence, from 0, that the prompt begins with, all of it; None if
    the prompt begins a new one."""
    max_tokens: int
    stop: tuple[str, ...] = ()
    """Texts that end the turn."""


@dataclass(frozen=True)
class AgentEnd:
    """The end of an agent: its completion is done."""

    conversation: int
    finish_reason: FinishReason
    """"error" if it failed: the completion has no reward."""
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The messages that it returned, or else those that the model wrote and read."""


@dataclass(frozen=True)
class EnvironmentReply:
    """An environment's reply to a turn."""

    conversation: int
    """Number of the environment, from now on exclusive to this completion."""
    messages: tuple[Mapping[str, Any], ...]
    """The turn and the reply to it, as chat messages."""
    token_ids: tuple[int, ...] = ()
    """Tokens between this turn and the next one; empty if there is no next one."""
    failed: bool = False
    """True if the environment failed: the completion has no reward."""

    @property
    def over(self) -> bool:
        """True if the conversation has ended."""
        return not self.token_ids


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards."""

    group: Group
    rewards: tuple[float | None, ...]
    """Reward per leaf, the weighted sum of the parts. None if no part gave a number; the leaf is
    then left out of every baseline and not trained on."""
    parts: Mapping[str, tuple[float | None, ...]]
    """Unweighted reward of each leaf by reward function; None is "not applicable" or "failed"."""


@dataclass(frozen=True, eq=False)
class BatchNode:
    """A node prepared for the update: tokens, and one coefficient per token."""

    prompt: int
    """Index into `Batch.prompts`."""
    parent: int
    """Index into `Batch.nodes`, -1 for a root. Parents come before children."""
    token_ids: np.ndarray
    """(n,) int32."""
    coefficients: np.ndarray
    """(n,) float32, share times advantage; 0 where the model did not write the token."""
    anchor_logprobs: np.ndarray
    """(n,) float32, what the update's first pass is corrected for: the sampler's log-probabilities
    of fresh tokens; those of the policy at the start of the step for tokens sampled by an earlier
    one. See `staleness.anchor_logprobs`."""
    finish: bool
    """True if a completion ends here."""
    kl_weights: np.ndarray
    """(n,) float32, kl_coef times share; 0 where the model did not write the token."""

    @property
    def trained(self) -> np.ndarray:
        """(n,) bool, True for tokens with a nonzero coefficient or KL weight."""
        return (self.coefficients != 0) | (self.kl_weights != 0)


@dataclass(frozen=True)
class Batch:
    """The update's entire input of one step: tokens, structure, one coefficient per token, Z."""

    prompts: tuple[tuple[int, ...], ...]
    nodes: tuple[BatchNode, ...]
    z: float
    """The single denominator: by default prompts of the step times the *configured*
    max_completion_tokens. See `localrl.learning.objectives.denominator`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that rollouts and update may use: plain numbers, planned before the run."""

    group_size: int
    decode_rows: int
    """Number of sequences decoded at once."""
    prefill_rows: int
    """Number of prompts prefilled at once."""
    micro_rows: int
    """Number of sequences in one backward pass."""
    head_chunk: int
    """Number of positions whose logits are held at once in the update."""
    max_prompt_tokens: int
    """Longest prompt that the sizes are planned for; a longer allowed one changes the plan."""
    max_completion_tokens: int
    grad_checkpoint: bool
    dequantise: bool
    """True if the frozen base is kept as float32 matrices (the CPU's fast path)."""
    threads: int | None
    predicted_bytes: int | None
    """Predicted peak memory in bytes; None if not estimated."""
    limit_bytes: int | None
    reason: str
    measured: bool = False
    """True if the prediction is based on measurements of this machine and model."""


@dataclass(frozen=True)
class StepStats:
    """Statistics of one update, summed over its micro-batches; None where there was no update."""

    loss: float | None
    grad_norm: float | None
    clipped_low: float | None
    """Share of trained tokens whose ratio was clipped at 1 - clip_low in the step's last update; 0
    if that is also the first."""
    clipped_high: float | None
    logprob_gap_mean: float | None
    """Mean |new - sampled| log-probability before the first update on each token's mini-batch."""
    logprob_gap_max: float | None
    truncated: float | None
    """Share of trained tokens whose correction for the sampler was truncated."""
    kl: float | None
    """Mean KL to its reference, weighted as in the loss; None without a KL term."""
    drift: float | None
    """Mean |change of log-probability| by the step, in nats, over some trained tokens."""
    trained_tokens: int
    saved_positions: int
    """Number of positions not recomputed because completions share them, including the prompt's."""
    updated: bool
    problem: str | None = None
    """Reason an update was skipped or undone: something was not finite."""
    relative_size: float | None = None
    """Mean size of the adapters' products relative to the weights, see `policy.size`."""


@dataclass(frozen=True)
class Work:
    """The work that a process is doing at the moment, for a person who waits for it."""

    name: str
    """The activity, as in "loading the model"."""
    done: int = 0
    total: int = 0
    """Number of its parts; 0 if unknown."""
    tokens: int = 0
    """Number of tokens sampled in it so far."""


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean of the values, or None if there are none: no number is invented."""
    return float(np.mean(values)) if len(values) else None
