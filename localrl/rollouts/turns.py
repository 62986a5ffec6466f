"""Multi-turn completions, which continue after an environment has replied.

All completions whose turn has ended get their replies together and are decoded together. A reply
becomes a node whose tokens are not sampled: the model reads them, and they carry no
log-probability, loss or length. The tokens of earlier turns stay as they were drawn and are never
rendered again, so the sampled tokens are exactly the ones scored.

Each turn prefills its whole path again, all paths in one call: this costs positions but no extra
calls, and no cache has to be kept while an environment works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from localrl.policy.tokenizer import Tokenizer
from localrl.records import EnvironmentReply, FinishReason, Group, Leaf, ModelTurn, Node
from localrl.rollouts.batch import Segment, TreeRequest, end_leaf
from localrl.rollouts.decode import Decoder, ForkRule

Answer = Callable[[Sequence[ModelTurn]], list[EnvironmentReply]]
"""Passes turns to their environments and returns the replies."""


@dataclass(frozen=True)
class Turns:
    """The settings of multi-turn completions."""

    answer: Answer
    most: int
    """Maximum number of model turns in one completion."""


@dataclass(frozen=True)
class _Conversation:
    """A completion whose turn has just ended."""

    group: int
    place: tuple[int, ...]
    """Index of the completion in its group, then one index per turn: 0 unless paths forked."""
    leaf: Leaf
    ids: tuple[int, ...]
    """Its tokens so far."""
    turn: tuple[int, ...]
    """Tokens of its latest turn."""


def run_turns(
    decoder: Decoder,
    groups: Sequence[Group],
    turns: Turns,
    *,
    rule: ForkRule | None,
    leaves: int,
    max_completion_tokens: int,
    address: tuple[int | str, ...],
    version: int,
) -> list[Group]:
    """Continue every completion of single-turn groups with its environment until it is done.

    `leaves` is the maximum number of completions in a group: forks of later turns share what
    earlier ones left unused. A completion ends when its environment says so; with "turns" after
    `turns.most` turns; with "length" if a reply leaves no room for another token; with "error" if
    the environment failed. `max_completion_tokens` covers the whole completion, replies included. A
    draw depends on (address, example, turn, place in the tree) and on the policy.
    """
    nodes = [list(group.nodes) for group in groups]
    going, done = _first_turns(groups), []
    for number in range(1, turns.most + 1):
        replies = turns.answer([_model_turn(groups[talk.group], talk) for talk in going])
        answered = [
            _apply_reply(talk, reply, last=number == turns.most, most=max_completion_tokens)
            for talk, reply in zip(going, replies, strict=True)
        ]
        done += [talk for talk, more in answered if not more]
        waiting = [(talk, more) for talk, more in answered if more]
        if not waiting:
            break
        shares = _shares(done, waiting, leaves)
        requests = [
            TreeRequest(
                prompt=i,
                address=(*address, groups[talk.group].example.id, f"turn {number}", *talk.place),
                roots=1,
                leaves=1 + share,
                max_tokens=max_completion_tokens - len(talk.ids) - len(more),
            )
            for i, ((talk, more), share) in enumerate(zip(waiting, shares, strict=True))
        ]
        prompts = [(*groups[t.group].prompt_ids, *t.ids, *more) for t, more in waiting]
        trees = _by_tree(decoder.decode(prompts, requests, rule), len(requests))
        going = [
            after
            for (talk, more), tree in zip(waiting, trees, strict=True)
            for after in _append_turn(
                nodes[talk.group], talk, more, tree, version, decoder.policy.tokenizer
            )
        ]
    ends = sorted(done, key=lambda talk: talk.place)
    return [
        replace(group, nodes=tuple(own), leaves=tuple(t.leaf for t in ends if t.group == g))
        for g, (group, own) in enumerate(zip(groups, nodes, strict=True))
    ]


def _first_turns(groups: Sequence[Group]) -> list[_Conversation]:
    talks = []
    for g, group in enumerate(groups):
        for i, leaf in enumerate(group.leaves):
            ids = tuple(group.completion(i).token_ids.tolist())
            talks.append(_Conversation(g, (i,), leaf, ids, ids))
    return talks


def _model_turn(group: Group, talk: _Conversation) -> ModelTurn:
    leaf = talk.leaf
    return ModelTurn(group.example, leaf.conversation, talk.turn, leaf.text, leaf.finish_reason)


def _apply_reply(
    talk: _Conversation, reply: EnvironmentReply, *, last: bool, most: int
) -> tuple[_Conversation, tuple[int, ...]]:
    """The completion with its reply, and the tokens its next turn continues from, if any."""
    reason: FinishReason = talk.leaf.finish_reason
    more = reply.token_ids
    if reply.failed:
        reason, more = "error", ()
    elif more and last:
        reason, more = "turns", ()
    elif more and len(talk.ids) + len(more) >= most:
        reason, more = "length", ()
    messages = (*talk.leaf.messages, *reply.messages)
    leaf = replace(
        talk.leaf, finish_reason=reason, messages=messages, conversation=reply.conversation
    )
    return replace(talk, leaf=leaf), more


def _shares(
    done: Sequence[_Conversation],
    waiting: Sequence[tuple[_Conversation, tuple[int, ...]]],
    leaves: int,
) -> list[int]:
    """Number of completions forks may add to each one that continues, even within a group."""
    there = Counter(talk.group for talk in done)
    going = Counter(talk.group for talk, _ in waiting)
    shares, seen = [], Counter[int]()
    for talk, _ in waiting:
        spare = leaves - there[talk.group] - going[talk.group]
        each, over = divmod(spare, going[talk.group])
        shares.append(each + (seen[talk.group] < over))
        seen[talk.group] += 1
    return shares


def _by_tree(segments: Sequence[Segment], count: int) -> list[list[tuple[int, Segment]]]:
    """The segments of each request with their indices, parents first."""
    trees: list[list[tuple[int, Segment]]] = [[] for _ in range(count)]
    for index, segment in enumerate(segments):
        trees[segment.tree].append((index, segment))
    return trees


def _append_turn(
    nodes: list[Node],
    talk: _Conversation,
    more: tuple[int, ...],
    tree: Sequence[tuple[int, Segment]],
    version: int,
    tokenizer: Tokenizer,
) -> list[_Conversation]:
    """Append the reply and the next turn to a completion; returns several if the turn forked."""
    nodes.append(unsampled(talk.leaf.node, more, version))
    root, places, turns, after = len(nodes) - 1, {}, {-1: ()}, []
    for index, segment in tree:
        nodes.append(segment.node(places.get(segment.parent, root), version))
        places[index] = len(nodes) - 1
        turn = turns[index] = (*turns[segment.parent], *segment.token_ids.tolist())
        if segment.end != "fork":
            end = end_leaf(places[index], turn, segment.end, tokenizer)
            leaf = replace(talk.leaf, node=end.node, finish_reason=segment.end, text=end.text)
            place = (*talk.place, len(after))
            after.append(_Conversation(talk.group, place, leaf, (*talk.ids, *more, *turn), turn))
    return after


def unsampled(parent: int, ids: tuple[int, ...], version: int) -> Node:
    """A node of tokens that the model did not write."""
    nothing = np.zeros(len(ids), np.float32)
    tokens = np.array(ids, np.int32)
    return Node(parent, tokens, np.zeros(len(ids), bool), nothing, nothing, version=version)
