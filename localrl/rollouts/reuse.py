"""Reuse: earlier completions, as far as the present policy would write them, begin new ones.

From a prompt's second visit on, one forward pass over an earlier completion y says how likely the
present policy finds its tokens. Token t is accepted while

    U_t <= min(1, p_now(y_t) / p_sampled(y_t)),      U_t keyed and uniform

and the tail behind the accepted prefix is sampled anew. The rule is that of SPEC-RL (arXiv
2509.23232) without its lenience. It is no exact draw from the present policy, as the first refused
token is not redrawn from what is left of the distribution. So accepted tokens keep the
log-probabilities they were sampled with and are corrected like all tokens of an earlier policy: the
rule only decides how stale a prefix may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import Example, FinishReason, Group, Leaf, Node
from localrl.rollouts.batch import Segment, TreeRequest, end_leaf
from localrl.utils.rng import keyed_uniforms

MOST_TOKENS = 4_000_000
"""Tokens kept for later: about 70 MB. The groups longest unseen leave."""
NOT_REUSED = ("turns", "error")
"""Completions that ended in these ways hold what is not the policy's own."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What was accepted of an earlier completion. Arrays are (n,), n may be 0."""

    token_ids: np.ndarray
    sampled_logprobs: np.ndarray
    """Under the policy that wrote the tokens."""
    entropies: np.ndarray
    version: int
    """Number of updates made before the oldest of the tokens was sampled."""
    old_logprobs: np.ndarray
    """Under the present policy."""
    finish_reason: FinishReason | None
    """Why the earlier completion ended, where it was accepted whole; else None."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        """Whether there is nothing to add."""
        return self.finish_reason is not None


@dataclass(eq=False)
class CompletionCache:
    """The newest group of each example, whatever its rewards."""

    most_tokens: int = MOST_TOKENS
    _groups: dict[str, Group] = field(default_factory=dict)
    """By example id, the one longest unseen first."""
    _tokens: int = 0

    def __len__(self) -> int:
        return len(self._groups)

    def copy(self) -> CompletionCache:
        """One that may go its own way; groups themselves never change."""
        return replace(self, _groups=dict(self._groups))

    def add(self, groups: Sequence[Group]) -> None:
        """Keep these in place of what was kept of their examples."""
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
        """At most `count` earlier completions of the example, as a flat group of whole paths.

        One for each root, the first roots first, so that all are independent: of a tree, a leaf
        drawn as the tree's forks would have drawn it. None where there is nothing, or where the
        prompt was encoded to other tokens. A path of several policies has the oldest one's version.
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


def accepted(now: np.ndarray, sampled: np.ndarray, uniforms: np.ndarray) -> int:
    """How many tokens from the first on are accepted, given (T,) log-probabilities and uniforms."""
    likelier = np.subtract(now, sampled, dtype=np.float64)
    refused = ~(uniforms <= np.exp(np.minimum(likelier, 0.0)))  # what is no number is refused
    return int(refused.argmax()) if refused.any() else len(refused)


def verified_prefix(
    draft: Node, reason: FinishReason, now: np.ndarray, uniforms: np.ndarray, max_tokens: int
) -> Prefix:
    """What of an earlier completion may begin a new one of at most `max_tokens`.

    It is whole when all tokens were accepted, fit, and end it now as they did then: one that was
    cut at a shorter limit goes on. Else it leaves room for a token at least.
    """
    length = len(draft.token_ids)
    ends = length == max_tokens if reason == "length" else length <= max_tokens
    n = accepted(now, draft.sampled_logprobs, uniforms)
    whole = ends and n == length
    n = n if whole else min(n, max_tokens - 1)
    return Prefix(
        token_ids=draft.token_ids[:n],
        sampled_logprobs=draft.sampled_logprobs[:n],
        entropies=draft.entropies[:n],
        version=draft.version,
        old_logprobs=np.asarray(now[:n], np.float32),
        finish_reason=reason if whole else None,
    )


def verify(
    drafts: Group, now: Sequence[np.ndarray], *, max_completion_tokens: int, seed: int, step: int
) -> list[Prefix]:
    """The verified prefix of every draft; `now` has their (T,) under the present policy."""
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
    """What to decode behind the incomplete prefixes of every example, in their order.

    Further prompts, each with its prefix, and requests for them whose `prompt` counts on from
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
                    )
                )
    return further, requests


def place_tails(
    prefixes: Sequence[Sequence[Prefix]], segments: Sequence[Segment]
) -> list[list[Segment | None]]:
    """The segments of `tail_requests`, in their order, beside their prefixes; None if complete."""
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
    """The group of freshly sampled completions, if any, with reused ones, each a root of its own.

    A reused completion is a root that an earlier policy wrote, with the fresh tail as its only
    child; it is one node where either of them is empty.
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
    )


def _one_per_root(group: Group, address: tuple[int | str, ...]) -> list[int]:
    """A leaf of every root, drawn by the weights of the nodes on the way."""
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
    """The whole path to a leaf as one root."""
    completion = group.completion(leaf)
    path = group.path(group.leaves[leaf].node)
    return Node(
        parent=-1,
        token_ids=completion.token_ids,
        sampled=completion.sampled,
        sampled_logprobs=completion.sampled_logprobs,
        entropies=completion.entropies,
        version=min(group.nodes[n].version for n in path),
    )


def _tokens(group: Group) -> int:
    return sum(len(node.token_ids) for node in group.nodes)
