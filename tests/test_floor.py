"""As few forward calls and positions as a step can do with, counted inside the model.

Floor of one prompt of P tokens with G completions of S tokens: one prefill of P positions, S - 1
decode calls of at most G rows, and one pass with gradient in which the prompt stands once and the
head runs at the tokens that are trained.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from localrl.config import LearningConfig
from localrl.learning.credit import assign_credit
from localrl.learning.selection import select
from localrl.learning.update import DRIFT_TOKENS, Updater
from localrl.memory.plan import wanted
from localrl.records import Example, ScoredGroup
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups

P, G, S = 9, 4, 12
HEADS = 3
"""Calls of the head for a gradient: for the log-probabilities, for their slope, and to go back
through it, whose logits nobody asks for, so that they are not computed."""


class Calls:
    """Shapes of what body and head of a model are called with."""

    def __init__(self, monkeypatch, policy):
        self.body: list[tuple[int, int]] = []
        self.head: list[int] = []
        body, head = type(policy.model.model), type(policy.model.model.embed_tokens)
        run, project = body.__call__, head.as_linear

        def count_body(module, tokens, *given, **options):
            self.body.append(tokens.shape)
            return run(module, tokens, *given, **options)

        def count_head(module, states):
            self.head.append(states.size // states.shape[-1])
            return project(module, states)

        monkeypatch.setattr(body, "__call__", count_body)
        monkeypatch.setattr(head, "as_linear", count_head)

    @property
    def positions(self) -> int:
        return sum(rows * length for rows, length in self.body)


@pytest.fixture
def endless(policy):
    """Without an end token; the head is looked up when it is called, so that it can be counted."""
    tokenizer = replace(policy.tokenizer, end_ids=frozenset())
    embedding = policy.model.model.embed_tokens
    return replace(policy, tokenizer=tokenizer, head=lambda states: embedding.as_linear(states))


def rollout(policy, prompts=1):
    decoder = Decoder(policy, 1.0, prompts * G)
    groups = sample_groups(
        decoder,
        [Example(str(n), ({"role": "user", "content": "x"},)) for n in range(prompts)],
        [tuple(range(4 + n, 4 + n + P)) for n in range(prompts)],
        Shape(G, G),
        rule=None,
        max_completion_tokens=S,
        seed=0,
        step=1,
        version=0,
    )
    return groups, decoder.counts


def batch_of(updater, groups):
    rewards = tuple(float(n % 2) for n in range(G))
    scored = [ScoredGroup(group, rewards, {"r": rewards}) for group in groups]
    credits = [assign_credit(group) for group in scored]
    return select(scored, credits, float(len(groups) * S), updater.objective).batch


def make_updater(policy):
    updater = Updater(policy, LearningConfig(lr=0.0), temperature=1.0)
    updater.shared = True  # as the first batch of a run finds out
    return updater


def make_plan(**changes):
    from localrl.config import RunConfig

    plan = wanted(RunConfig(), vocabulary=64, on_cpu=True, threads=1)
    return replace(plan, micro_rows=1000, head_chunk=1000, **changes)


def test_a_rollout_is_one_prefill_and_a_call_for_each_further_token(endless, monkeypatch):
    calls = Calls(monkeypatch, endless)
    groups, counts = rollout(endless)
    assert [len(completion) for completion in groups[0].completions()] == [S] * G
    assert calls.body == [(1, P)] + [(G, 1)] * (S - 1)
    assert calls.head == [1] + [G] * (S - 1)
    assert counts.forward_calls == len(calls.body) == S
    assert (counts.prefill_positions, counts.decode_positions) == (P, G * (S - 1))


def test_rows_that_have_ended_do_not_come_back(policy, monkeypatch):
    calls = Calls(monkeypatch, policy)
    groups, _ = rollout(policy, prompts=4)
    lengths = np.array([len(c) for group in groups for c in group.completions()])
    assert lengths.min() < lengths.max()
    assert calls.body[0] == (4, P)
    assert len(calls.body) == lengths.max()
    for token, (rows, length) in enumerate(calls.body[1:], start=1):
        alive = int((lengths > token).sum())
        # Those that ended ride along while they are less than an eighth of the rows.
        assert length == 1
        assert alive <= rows < alive + max(1, rows / 8)


def test_an_update_is_one_pass_with_the_prompt_once(endless, monkeypatch):
    updater = make_updater(endless)
    batch = batch_of(updater, rollout(endless)[0])
    calls = Calls(monkeypatch, endless)
    updater.gradient(batch, make_plan())
    # The prompt's last token is the first input of each completion, in the place of its last one.
    assert calls.body == [(1, P - 1), (G, S)]
    assert calls.head == [G * S] * HEADS


def test_micro_batches_add_no_more_than_their_prompts(endless, monkeypatch):
    updater = make_updater(endless)
    batch = batch_of(updater, rollout(endless, prompts=3)[0])
    calls = Calls(monkeypatch, endless)
    updater.gradient(batch, replace(make_plan(), micro_rows=G))
    assert calls.body == [(1, P - 1), (G, S)] * 3
    assert calls.head == [G * S] * 3 * HEADS


def test_the_drift_is_measured_on_a_sample_once_and_without_gradient(endless, monkeypatch):
    updater, prompts = make_updater(endless), 8
    batch = batch_of(updater, rollout(endless, prompts=prompts)[0])
    paths = -(-DRIFT_TOKENS // S)
    assert paths < prompts * G
    calls = Calls(monkeypatch, endless)
    updater.update(batch, make_plan())
    whole, sample = prompts * (P - 1 + G * S), -(-paths // G) * (P - 1) + paths * S
    assert calls.positions == whole + sample
    assert calls.head == [prompts * G * S] * HEADS + [paths * S]


def test_completions_that_teach_nothing_cost_nothing(endless, monkeypatch):
    updater = make_updater(endless)
    groups, _ = rollout(endless, prompts=2)
    rewards = [(0.0, 1.0, 0.0, 1.0), (1.0,) * G]
    scored = [ScoredGroup(g, r, {"r": r}) for g, r in zip(groups, rewards, strict=True)]
    credits = [assign_credit(group) for group in scored]
    batch = select(scored, credits, 2.0 * S, updater.objective).batch
    calls = Calls(monkeypatch, endless)
    updater.gradient(batch, make_plan())
    assert calls.body == [(1, P - 1), (G, S)]
