"""As few forward calls and positions as a step can do with, counted inside the model.

Floor of one prompt of P tokens with G completions of S tokens: one prefill of P positions, S - 1
decode calls of at most G rows, and one pass with gradient in which the prompt stands once and the
head runs at the tokens that are trained.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from arrays import array_policy

from localrl.backend import mx
from localrl.engines.choose import choose_engine
from localrl.engines.cpu import merged
from localrl.engines.cpu.math import FusedLinear
from localrl.engines.cpu.weights import Weights
from localrl.engines.mlx.engine import MLXEngine
from localrl.learning.credit import assign_credit
from localrl.learning.selection import select
from localrl.learning.update import DRIFT_TOKENS, Updater
from localrl.memory.plan import initial_plan
from localrl.records import Example, ScoredGroup
from localrl.rollouts import decode
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups
from localrl.settings import LearningConfig

P, G, S = 9, 4, 12
HEADS = 3
"""Calls of the head for a gradient: for the log-probabilities, for their gradient, and to go back
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
    network = replace(policy.engine.network, head=lambda states: embedding.as_linear(states))
    return replace(policy, tokenizer=tokenizer, engine=MLXEngine(network))


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
    updater.gradient.shared = True  # as the first batch of a run finds out
    return updater


def make_plan(**changes):
    from localrl.config import RunConfig

    plan = initial_plan(RunConfig(), vocabulary=64, on_cpu=True, threads=1)
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


SCORED = 1
"""Calls of NumPy's head for a gradient: the gradient needs no logits of its own."""


class Columns:
    """Columns that the first layers of each block, and the head, are given by NumPy."""

    def __init__(self, monkeypatch, policy):
        self.blocks: list[list[int]] = [[] for _ in policy.model.layers]
        self.head: list[int] = []
        self._places = {}
        for counted, block in zip(self.blocks, policy.model.layers, strict=True):
            self._places[self._address(block.self_attn.q_proj.linear.weight)] = counted
        call, merge = FusedLinear.__call__, merged._merge
        logits = Weights.logits

        def count(linears, x):
            place = self._places.get(linears.weight.ctypes.data)
            if place is not None:
                place.append(x.shape[1])
            return call(linears, x)

        def count_too(linears):
            found = merge(linears)
            place = self._places.get(linears.weight.ctypes.data)
            if place is not None:
                self._places[found.weight.ctypes.data] = place
            return found

        def count_head(weights, states):
            self.head.append(states.shape[1])
            return logits(weights, states)

        def refuse(*given, **options):
            raise AssertionError("MLX was to compute this")

        monkeypatch.setattr(FusedLinear, "__call__", count)
        monkeypatch.setattr(Weights, "logits", count_head)
        monkeypatch.setattr(merged, "_merge", count_too)
        monkeypatch.setattr(type(policy.model.model), "__call__", refuse)

    def _address(self, array: mx.array) -> int:
        return np.array(array, copy=False).ctypes.data

    @property
    def body(self) -> list[int]:
        """Of one block; all have the same."""
        assert all(counted == self.blocks[0] for counted in self.blocks)
        return self.blocks[0]


@pytest.fixture
def arrays(endless):
    checked = choose_engine(endless)
    assert checked.engine.name == "cpu"
    return checked


@pytest.mark.parametrize("shared_positions", [0, 1 << 30], ids=["shared", "copied"])
def test_a_rollout_of_arrays_is_one_prefill_and_a_step_for_each_further_token(
    arrays, monkeypatch, shared_positions
):
    monkeypatch.setattr(decode, "SHARED_POSITIONS", shared_positions)
    columns = Columns(monkeypatch, arrays)
    groups, counts = rollout(arrays)
    assert [len(completion) for completion in groups[0].completions()] == [S] * G
    assert columns.body == [P] + [G] * (S - 1)
    assert columns.head == [1] + [G] * (S - 1)
    assert counts.forward_calls == len(columns.body)


def test_rows_of_arrays_that_have_ended_do_not_come_back(policy, monkeypatch):
    policy = choose_engine(policy)
    columns = Columns(monkeypatch, policy)
    groups, _ = rollout(policy, prompts=4)
    lengths = np.array([len(c) for group in groups for c in group.completions()])
    assert lengths.min() < lengths.max()
    assert columns.body[0] == 4 * P
    assert len(columns.body) == lengths.max()
    for token, rows in enumerate(columns.body[1:], start=1):
        alive = int((lengths > token).sum())
        assert alive <= rows < alive + max(1, rows / 8)
    assert columns.head == [4, *columns.body[1:]]


@pytest.mark.parametrize("recomputed", [False, True])
def test_an_update_of_arrays_is_one_pass_with_the_prompt_once(arrays, monkeypatch, recomputed):
    updater = make_updater(arrays)
    batch = batch_of(updater, rollout(arrays)[0])
    columns = Columns(monkeypatch, arrays)
    updater.gradient(batch, make_plan(grad_checkpoint=recomputed))
    # A block that is computed again begins with the lowest level.
    assert columns.body == [P - 1, G * S] + [G * S, P - 1] * recomputed
    assert columns.head == [G * S] * SCORED


def test_micro_batches_of_arrays_add_no_more_than_their_prompts(arrays, monkeypatch):
    updater = make_updater(arrays)
    batch = batch_of(updater, rollout(arrays, prompts=3)[0])
    columns = Columns(monkeypatch, arrays)
    updater.gradient(batch, replace(make_plan(), micro_rows=G))
    assert columns.body == [P - 1, G * S] * 3
    assert columns.head == [G * S] * 3 * SCORED


def test_the_drift_of_arrays_is_measured_on_a_sample_once(arrays, monkeypatch):
    updater, prompts = make_updater(arrays), 8
    batch = batch_of(updater, rollout(arrays, prompts=prompts)[0])
    paths = -(-DRIFT_TOKENS // S)
    columns = Columns(monkeypatch, arrays)
    updater.update(batch, make_plan())
    whole, sample = prompts * (P - 1 + G * S), -(-paths // G) * (P - 1) + paths * S
    assert sum(columns.body) == whole + sample
    assert columns.head == [prompts * G * S] * SCORED + [paths * S]


def test_completions_that_teach_nothing_cost_arrays_nothing(arrays, monkeypatch):
    updater = make_updater(arrays)
    groups, _ = rollout(arrays, prompts=2)
    rewards = [(0.0, 1.0, 0.5, 0.5), (1.0,) * G]
    scored = [ScoredGroup(g, r, {"r": r}) for g, r in zip(groups, rewards, strict=True)]
    credits = [assign_credit(group) for group in scored]
    batch = select(scored, credits, 2.0 * S, updater.objective).batch
    columns = Columns(monkeypatch, arrays)
    updater.gradient(batch, make_plan())
    assert columns.body == [P - 1, 2 * S]
    assert columns.head == [2 * S] * SCORED


def test_the_way_back_ends_at_the_lowest_adapter(tmp_path, monkeypatch):
    policy = array_policy(tmp_path / "model", "smollm3", layers=1)
    updater = make_updater(policy)
    batch = batch_of(updater, rollout(policy)[0])
    back, calls = FusedLinear.back, []

    def count(linears, *given):
        calls.append(linears)
        return back(linears, *given)

    monkeypatch.setattr(FusedLinear, "back", count)
    updater.gradient(batch, make_plan())
    # Of the last block's four inputs each on two levels.
    assert len(calls) == 4 * 2
