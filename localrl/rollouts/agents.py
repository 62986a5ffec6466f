"""Completions of agents: programs that call for turns of the model, with prompts that they make.

All agents of a step whose calls have arrived get their turns together, as rows of one batch; then
all are waited for again. A call whose prompt begins with a whole sequence of its completion, what
the model wrote included, continues that sequence: the rest of the prompt becomes tokens that the
model only reads, as an environment's replies are (`rollouts/turns.py`). Any other call begins a new
sequence beside it. Nothing is tokenised here: prompts arrive as ids.

The prompt of a group is what all prompts of its sequences begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np

from localrl.errors import ConfigError
from localrl.policy.tokenizer import Tokenizer
from localrl.records import AgentCall, AgentEnd, Example, Group, Leaf, ModelTurn, Node
from localrl.rollouts.batch import Segment, TreeRequest, end_leaf
from localrl.rollouts.decode import Decoder
from localrl.rollouts.turns import unsampled

Asked = AgentCall | AgentEnd


@dataclass(frozen=True)
class AgentTurns:
    """A source of agents' calls. Both functions return one call or end for each agent, in order."""

    begin: Callable[[Sequence[Example], int], list[Asked]]
    """Starts an agent for each of these examples; the number is `max_completion_tokens`."""
    answer: Callable[[Sequence[ModelTurn]], list[Asked]]
    """Hands agents the turns that they called for."""


@dataclass
class _Sequence:
    """A conversation of an agent: the prompt of its first call, and what was added."""

    prompt: tuple[int, ...]
    parts: list[tuple[int, ...] | Segment] = field(default_factory=list)
    """Tokens that the model read, and turns that it wrote."""
    length: int = 0
    """Number of tokens, the prompt's included."""

    def add(self, prompt: Sequence[int], turn: Segment) -> None:
        """Add a turn, and what its prompt has beyond the sequence so far."""
        if more := tuple(prompt[self.length :]):
            self.parts.append(more)
        self.parts.append(turn)
        self.length = len(prompt) + len(turn.token_ids)


@dataclass
class _Talk:
    """A completion: an agent at work."""

    example: int
    place: int
    """Index of the completion among those of its example in this round."""
    sequences: list[_Sequence] = field(default_factory=list)
    last: int = 0
    """Index of the sequence that was continued last."""
    calls: int = 0
    end: AgentEnd | None = None

    def add(self, call: AgentCall, turn: Segment) -> None:
        """Add a turn of the model to the sequence that it belongs to."""
        if call.continues is None:
            self.sequences.append(_Sequence(call.prompt, length=len(call.prompt)))
        self.last = len(self.sequences) - 1 if call.continues is None else call.continues
        self.sequences[self.last].add(call.prompt, turn)
        self.calls += 1


def run_agents(
    decoder: Decoder,
    examples: Sequence[Example],
    turns: AgentTurns,
    *,
    roots: int,
    planned_roots: int,
    max_completion_tokens: int,
    seed: int,
    step: int,
    version: int,
    round: int,
) -> list[Group]:
    """Run `roots` agents for every example to their ends, and return a group for each example.

    A draw depends on (seed, step, round, example, turn, place in the group) and on the policy, in
    the same way as in `run_turns`: an agent that does what an environment does gets the same.
    """
    talks = [_Talk(p, i) for p in range(len(examples)) for i in range(roots)]
    asked = turns.begin([examples[talk.example] for talk in talks], max_completion_tokens)
    going = talks
    while True:
        for talk, one in zip(going, asked, strict=True):
            talk.end = one if isinstance(one, AgentEnd) else None
        calls = [
            (talk, one)
            for talk, one in zip(going, asked, strict=True)
            if isinstance(one, AgentCall)
        ]
        if not calls:
            break
        prompts = list(dict.fromkeys(call.prompt for _, call in calls))
        places = {prompt: place for place, prompt in enumerate(prompts)}
        requests = [
            TreeRequest(
                prompt=places[call.prompt],
                address=_address(talk, examples[talk.example], (seed, step, round)),
                roots=1,
                leaves=1,
                max_tokens=call.max_tokens,
                first_root=0 if talk.calls else round * roots + talk.place,
            )
            for talk, call in calls
        ]
        written: dict[int, Segment] = {s.tree: s for s in decoder.decode(prompts, requests)}
        spoken = []
        for i, (talk, call) in enumerate(calls):
            turn = _stopped(written[i], call.stop, decoder.policy.tokenizer)
            talk.add(call, turn)
            spoken.append(_model_turn(examples[talk.example], call, turn, decoder))
        going, asked = [talk for talk, _ in calls], turns.answer(spoken)
    return [
        _group(
            example,
            [talk for talk in talks if talk.example == p],
            decoder.policy.tokenizer,
            planned_roots,
            version,
            round,
        )
        for p, example in enumerate(examples)
    ]


def common_prompt(groups: Sequence[Group]) -> list[Group]:
    """Return groups of one example with the same prompt: what all of theirs begin with.

    Where a prompt was longer, its roots begin with the rest of it, as tokens that the model read.

    Raises: ConfigError if the prompts have no token in common.
    """
    shared = _shared([group.prompt_ids for group in groups], groups[0].example)
    return [
        group
        if group.prompt_ids == shared
        else replace(
            group,
            prompt_ids=shared,
            nodes=tuple(
                node if node.parent >= 0 else _after(group.prompt_ids[len(shared) :], node)
                for node in group.nodes
            ),
        )
        for group in groups
    ]


def _address(talk: _Talk, example: Example, where: tuple[int, int, int]) -> tuple[int | str, ...]:
    """Key of the random numbers of a completion's next turn."""
    if not talk.calls:
        return (*where[:2], example.id)
    return (*where, example.id, f"turn {talk.calls}", talk.place, *[0] * (talk.calls - 1))


def _model_turn(example: Example, call: AgentCall, turn: Segment, decoder: Decoder) -> ModelTurn:
    ids = tuple(turn.token_ids.tolist())
    reason = turn.end
    assert reason != "fork"
    leaf = end_leaf(0, ids, reason, decoder.policy.tokenizer)
    logprobs = tuple(map(float, turn.logprobs))
    return ModelTurn(example, call.conversation, ids, leaf.text, reason, logprobs)


def _stopped(turn: Segment, texts: Sequence[str], tokenizer: Tokenizer) -> Segment:
    """Return a turn up to the token that completes one of these texts, if one does.

    Each token is drawn from a number of its own, so they are those of a turn that ended there.
    """
    ids = turn.token_ids.tolist()
    if not any(text in tokenizer.decode(ids) for text in texts):
        return turn
    return next(
        turn.up_to(count)
        for count in range(1, len(ids) + 1)
        if any(text in tokenizer.decode(ids[:count]) for text in texts)
    )


def _group(
    example: Example,
    talks: Sequence[_Talk],
    tokenizer: Tokenizer,
    planned_roots: int,
    version: int,
    round: int,
) -> Group:
    """Build the record of an example's completions."""
    begun = [sequence.prompt for talk in talks for sequence in talk.sequences]
    # Without any call there is no prompt, and nothing is trained: one token stands for it.
    prompt = _shared(begun, example) if begun else tokenizer.plain_tokens()[:1]
    nodes: list[Node] = []
    leaves = []
    for talk in talks:
        end = talk.end
        assert end is not None
        if not talk.sequences:  # it ended before its first call
            nodes.append(replace(unsampled(-1, (), version), round=round))
        ends = [
            _append(nodes, sequence, len(prompt), version, round, beside=s != talk.last)
            for s, sequence in enumerate(talk.sequences)
        ] or [len(nodes) - 1]
        leaves.append(
            Leaf(
                ends.pop(talk.last),
                end.finish_reason,
                end.text,
                end.messages,
                end.conversation,
                tuple(ends),
            )
        )
    return Group(example, prompt, tuple(nodes), tuple(leaves), planned_roots)


def _append(
    nodes: list[Node], sequence: _Sequence, shared: int, version: int, round: int, *, beside: bool
) -> int:
    """Append a sequence's nodes, and return the index of the last one. shared: the length of the
    group's prompt."""
    parent = -1
    for part in sequence.parts:
        if parent < 0:
            assert isinstance(part, Segment)
            root = _after(sequence.prompt[shared:], part.node(-1, version, round))
            node = replace(root, cond_weight=0.0) if beside else root
        elif isinstance(part, Segment):
            node = part.node(parent, version)
        else:
            node = unsampled(parent, part, version)
        nodes.append(node)
        parent = len(nodes) - 1
    return parent


def _after(before: Sequence[int], node: Node) -> Node:
    """Return a node that begins with these tokens, which the model did not write."""
    if not before:
        return node
    zeros = np.zeros(len(before), np.float32)
    extended = {
        "token_ids": np.concatenate([np.array(before, np.int32), node.token_ids]),
        "sampled": np.concatenate([np.zeros(len(before), bool), node.sampled]),
    }
    for name in ("sampled_logprobs", "entropies", "old_logprobs", "scored_logprobs"):
        if (values := getattr(node, name)) is not None:
            extended[name] = np.concatenate([zeros, values])
    return replace(node, **extended)


def _shared(prompts: Sequence[Sequence[int]], example: Example) -> tuple[int, ...]:
    """Return the tokens that all prompts begin with.

    Raises: ConfigError if there are none.
    """
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = tuple(tokens[0] for tokens in same)
    if not shared:
        raise ConfigError(
            f"The agent's calls for {example.id} have prompts that begin with different tokens: "
            "this model's template writes no common beginning. Let all calls begin with a message "
            "of the same role, or use another model."
        )
    return shared
