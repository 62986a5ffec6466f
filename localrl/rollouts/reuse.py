"""Reuse: prefixes of earlier completions that the current policy accepts start new completions.

From a prompt's second visit on, one forward pass over an earlier completion y gives the current
policy's probabilities of its tokens. Token t is accepted while

    U_t <= min(1, p_now(y_t) / p_written(y_t)),      U_t keyed and uniform

and the tail after the accepted prefix is sampled again. The rule is that of SPEC-RL (arXiv
2509.23232) without its lenience. It is not an exact draw from the current policy, because the first
rejected token is not redrawn from the residual distribution. Accepted tokens therefore keep the
log-probabilities they were sampled with and are corrected like all tokens of an earlier policy: the
rule only decides how stale a prefix may be. In 16 bits p_written is not the sampler's record but
from a forward pass like that of p_now, see `Node.written_logprobs`, and log p_now - log p_written
is shrunk by what rounding explains of it: rounding alone would otherwise reject a third of the
tokens of an unchanged policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, FinishReason, Group, Leaf, Node
from localrl.rollouts.batch import Segment, TreeRequest, end_leaf
from localrl.utils.rng import keyed_uniforms
from localrl.utils.rounding import beyond_rounding

MOST_TOKENS = 4_000_000
"""Maximum number of stored tokens, about 70 MB, 85 if scored. The least recently seen groups are
dropped."""
NOT_REUSED = ("turns", "error")
"""Finish reasons of completions that contain text the policy did not write."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The accepted part of an earlier completion. Arrays are (n,); n may be 0."""

    token_ids: np.ndarray
    sampled_logprobs: np.ndarray
    """Log-probabilities under the policy that wrote the tokens."""
    entropies: np.ndarray
    version: int
    """Number of updates made before the oldest of the tokens was sampled."""
    old_logprobs: np.ndarray
    """Log-probabilities under the current policy."""
    finish_reason: FinishReason | None
    """Finish reason of the earlier completion if all of it was accepted; else None."""
    scored_logprobs: np.ndarray | None = None
    """As in `Node`."""
    expected_reward: float | None = None
    """As in `Node`: from before the oldest of the tokens was sampled."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        """True if nothing needs to be sampled after it."""
        return self.finish_reason is not None


@dataclass(eq=False)
class CompletionCache:
    """The newest group of each example, regardless of its rewards."""

    most_tokens: int = MOST_TOKENS
    _groups: dict[str, Group] = field(default_factory=dict)
    """Groups by example id, the least recently seen first."""
    _tokens: int = 0

    def __len__(self) -> int:
        return len(self._groups)

    def copy(self) -> CompletionCache:
        """Return an independent copy; the groups themselves are immutable."""
        return replace(self, _groups=dict(self._groups))

    def add(self, groups: Sequence[Group]) -> None:
        """Store these groups, replacing earlier ones of the same examples."""
        for group in groups:
            self._forget(group.example.id)
            self._groups[group.example.id] = group
            self._tokens += _tokens(group)
        while self._tokens > self.most_tokens:
            self._forget(next(iter(self._groups)))

    def drafts(
        self,
        example_id: str,
        prompt_ids: tuple[int, ...],
        count: int,
        *,
        address: tuple[int | str, ...],
    ) -> Group | None:
        """Return at most `count` earlier completions of the example as a flat group of whole paths.

        They are independent, one for each root, the first roots first: in a tree, a leaf is drawn
        with the probability its forks gave it. None if nothing is stored or if the prompt was
        encoded to different tokens. A path written by several policies has the oldest's version.
        """
        group = self._groups.get(example_id)
        if group is None or group.prompt_ids != prompt_ids:
            return None
        chosen = [i for i in _one_per_root(group, address) if _reusable(group, i)][:count]
        nodes = tuple(_path_node(group, i) for i in chosen)
        leaves = tuple(
            Leaf(n, group.leaves[i].finish_reason, group.leaves[i].text)
            for n, i in enumerate(chosen)
        )
        return Group(group.example, prompt_ids, nodes, leaves, len(nodes)) if nodes else None

    def _forget(self, example_id: str) -> None:
        group = self._groups.pop(example_id, None)
        self._tokens -= _tokens(group) if group is not None else 0


def accepted(
    now: np.ndarray, written: np.ndarray, uniforms: np.ndarray, rounding: np.ndarray | None = None
) -> int:
    """Number of leading tokens accepted, given (T,) log-probabilities and uniforms.

    rounding: differences (T,) by rounding alone; the log-ratios are shrunk accordingly.
    """
    likelier = np.subtract(now, written, dtype=np.float64)
    if rounding is not None:
        likelier *= beyond_rounding(float(likelier @ likelier), float(rounding @ rounding))
    refused = ~(uniforms <= np.exp(np.minimum(likelier, 0.0)))  # NaN is rejected
    return int(refused.argmax()) if refused.any() else len(refused)


def verified_prefix(
    draft: Node, reason: FinishReason, now: np.ndarray, uniforms: np.ndarray, max_tokens: int
) -> Prefix:
    """Return the prefix of an earlier completion that may start a new one of `max_tokens` at most.

    It is complete if all tokens were accepted, fit, and still end the completion: one that was cut
    off at a shorter limit continues. Otherwise it leaves room for at least one token.
    """
    length = len(draft.token_ids)
    ends = length == max_tokens if reason == "length" else length <= max_tokens
    n = accepted(now, draft.written_logprobs, uniforms, draft.rounding)
    whole = ends and n == length
    n = n if whole else min(n, max_tokens - 1)
    return Prefix(
        token_ids=draft.token_ids[:n],
        sampled_logprobs=draft.sampled_logprobs[:n],
        entropies=draft.entropies[:n],
        version=draft.version,
        old_logprobs=np.asarray(now[:n], np.float32),
        finish_reason=reason if whole else None,
        scored_logprobs=None if draft.scored_logprobs is None else draft.scored_logprobs[:n],
        expected_reward=draft.expected_reward,
    )


def verify(
    drafts: Group, now: Sequence[np.ndarray], *, max_completion_tokens: int, seed: int, step: int
) -> list[Prefix]:
    """Verify every draft; `now` holds its log-probabilities (T,) under the current policy."""
    found = []
    for j, (draft, leaf) in enumerate(zip(drafts.nodes, drafts.leaves, strict=True)):
        address = (*_address(seed, step, drafts.example, j), "accept")
        uniforms = keyed_uniforms(len(draft.token_ids), *address)
        found.append(
            verified_prefix(draft, leaf.finish_reason, now[j], uniforms, max_completion_tokens)
        )
    return found


def tail_requests(
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    prefixes: Sequence[Sequence[Prefix]],
    *,
    max_completion_tokens: int,
    seed: int,
    step: int,
) -> tuple[list[tuple[int, ...]], list[TreeRequest]]:
    """Build prompts and requests for the tails of all incomplete prefixes, in order.

    Each new prompt ends with its prefix, and `prompt` in the requests continues the numbering of
    `prompts`. A draw depends on (seed, step, example, number of the prefix, place in the tail) and
    on the policy.
    """
    places = {tuple(prompt): place for place, prompt in enumerate(prompts)}
    further: list[tuple[int, ...]] = []
    requests: list[TreeRequest] = []
    for example, prompt_ids, family in zip(examples, prompts, prefixes, strict=True):
        for j, prefix in enumerate(family):
            if not prefix.complete:
                whole = (*prompt_ids, *prefix.token_ids.tolist())
                if whole not in places:
                    places[whole] = len(prompts) + len(further)
                    further.append(whole)
                requests.append(
                    TreeRequest(
                        prompt=places[whole],
                        address=_address(seed, step, example, j),
                        roots=1,
                        leaves=1,
                        max_tokens=max_completion_tokens - len(prefix),
                        before=tuple(prefix.token_ids.tolist()),
                        example=example,
                    )
                )
    return further, requests


def place_tails(
    prefixes: Sequence[Sequence[Prefix]], segments: Sequence[Segment]
) -> list[list[Segment | None]]:
    """Match the segments of `tail_requests`, in order, to their prefixes; None if complete."""
    tails = iter(segments)
    return [[None if p.complete else next(tails) for p in family] for family in prefixes]


def with_reused(
    group: Group,
    prefixes: Sequence[Prefix],
    tails: Sequence[Segment | None],
    *,
    tokenizer: Tokenizer,
    version: int,
) -> Group:
    """Add reused completions to a group of freshly sampled ones, each as a root of its own.

    A reused completion is a root written by an earlier policy, with the fresh tail as its only
    child; it is a single node if either of them is empty.
    """
    nodes, leaves = list(group.nodes), list(group.leaves)
    for prefix, tail in zip(prefixes, tails, strict=True):
        parent = -1
        if len(prefix):
            parent = len(nodes)
            nodes.append(_prefix_node(prefix))
        if tail is not None:
            nodes.append(tail.node(parent, version))
        ids = [*prefix.token_ids.tolist(), *(tail.token_ids.tolist() if tail is not None else ())]
        leaves.append(end_leaf(len(nodes) - 1, ids, _reason(prefix, tail), tokenizer))
    return replace(group, nodes=tuple(nodes), leaves=tuple(leaves))


def _address(seed: int, step: int, example: Example, number: int) -> tuple[int | str, ...]:
    return seed, step, example.id, f"reuse{number}"


def _reason(prefix: Prefix, tail: Segment | None) -> FinishReason:
    if tail is None:
        assert prefix.finish_reason is not None
        return prefix.finish_reason
    assert tail.end != "fork"
    return tail.end


def _prefix_node(prefix: Prefix) -> Node:
    return Node(
        parent=-1,
        token_ids=prefix.token_ids,
        sampled=np.ones(len(prefix), bool),
        sampled_logprobs=prefix.sampled_logprobs,
        entropies=prefix.entropies,
        version=prefix.version,
        old_logprobs=prefix.old_logprobs,
        scored_logprobs=prefix.scored_logprobs,
        expected_reward=prefix.expected_reward,
    )


def _one_per_root(group: Group, address: tuple[int | str, ...]) -> list[int]:
    """Draw one leaf of every root, weighted by the nodes on its path."""
    families: dict[int, list[tuple[int, float]]] = {}
    for i, leaf in enumerate(group.leaves):
        root, *below = group.path(leaf.node)
        weight = float(np.prod([group.nodes[n].cond_weight for n in below]))
        families.setdefault(root, []).append((i, weight))
    chosen = []
    for root, family in sorted(families.items()):
        weights = np.cumsum([weight for _, weight in family])
        uniform = float(keyed_uniforms(1, *address, "draft", root)[0])
        place = np.searchsorted(weights, uniform * weights[-1], side="right")
        chosen.append(family[min(int(place), len(family) - 1)][0])
    return chosen


def _reusable(group: Group, leaf: int) -> bool:
    completion = group.completion(leaf)
    all_sampled = len(completion) > 0 and bool(completion.sampled.all())
    return all_sampled and completion.finish_reason not in NOT_REUSED


def _path_node(group: Group, leaf: int) -> Node:
    """Join the whole path to a leaf into one root node."""
    completion = group.completion(leaf)
    path = [group.nodes[n] for n in group.path(group.leaves[leaf].node)]
    scored = any(node.scored_logprobs is not None for node in path)
    return Node(
        parent=-1,
        token_ids=completion.token_ids,
        sampled=completion.sampled,
        sampled_logprobs=completion.sampled_logprobs,
        entropies=completion.entropies,
        version=min(node.version for node in path),
        scored_logprobs=np.concatenate([n.written_logprobs for n in path]) if scored else None,
        expected_reward=path[0].expected_reward,
    )


def _tokens(group: Group) -> int:
    return sum(len(node.token_ids) for node in group.nodes)
