"""Distillation estimates the gradients that it names, on a policy that is enumerated."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from enumerated import (
    LONGEST,
    PAIRS,
    PROMPT,
    all_logprobs,
    completions,
    examples,
    flattened,
    make_files,
    opened,
    padded,
)

from localrl.backend import mx, nn
from localrl.learning.credit import Credit
from localrl.records import Example

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from distillation import Distilling, Rule, with_hint, with_turn
from options import Listing
from rivals import instead

HINT = "s"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    with opened(make_files(folder), folder / "run", PAIRS) as session:
        yield replace(instead(Distilling, session), hint=HINT)


def exact(session: Distilling, credit: str) -> np.ndarray:
    """Compute the gradient (P,) of minus the KL that a credit stands for."""
    ids, mask = padded(completions())

    def chosen(found: Any) -> Any:
        """Log-probabilities (N,) of whole completions."""
        each = mx.take_along_axis(found, mx.array(ids)[..., None], axis=-1)[..., 0]
        return (each * mask).sum(axis=-1)

    def value() -> Any:
        own = all_logprobs(session, PROMPT, ids)
        taught = mx.stop_gradient(all_logprobs(session, PROMPT + session.hint, ids))
        if credit == "to go":
            return (mx.exp(chosen(own)) * (chosen(taught) - chosen(own))).sum()
        kl = (mx.exp(own) * (own - taught)).sum(axis=-1)
        # A prefix has the probability of all completions with it.
        return -(mx.stop_gradient(mx.exp(chosen(own)))[:, None] * mask * kl).sum()

    return flattened(nn.value_and_grad(session.policy.model, value)()[1])


def expectation(session: Distilling, credit: Literal["immediate", "to go"]) -> np.ndarray:
    """Compute the mean (P,) of what the stage estimates, from all completions at once."""
    everything = ["".join(t) for n in range(LONGEST + 1) for t in product(" as", repeat=n)]
    [example] = examples(1, 1)
    lister = instead(Listing, session.sampler)
    scored = lister.collect(1, [replace(example, columns={"options": everything})], 1)
    weights = [float(np.exp(n.sampled_logprobs.sum())) for n in scored[0].group.nodes]
    assert sum(weights) == pytest.approx(1)
    drawn = Credit((0.0,) * len(weights), tuple(weights))
    batch = replace(session, rule=Rule(credit)).select(1, scored, [drawn]).batch
    return -LONGEST * flattened(session.updater.gradient(batch, session.plan)[0])


def off(found: np.ndarray, known: np.ndarray) -> float:
    """The distance of two gradients, relative to the second."""
    return float(np.linalg.norm(found - known) / np.linalg.norm(known))


@pytest.mark.parametrize(("credit", "other"), [("immediate", "to go"), ("to go", "immediate")])
def test_the_mean_estimate_is_the_gradient_of_its_kl_and_not_of_the_other(session, credit, other):
    found = expectation(session, credit)
    assert off(found, exact(session, credit)) < 1e-3
    assert off(found, exact(session, other)) > 0.1


def test_a_rule_clips_adds_and_leaves_out():
    gaps = np.array([0.5, -3.0, 1.0])
    assert Rule(weight=2.0).advantages(gaps, 9.0, 1.0) == pytest.approx([1.0, -6.0, 2.0])
    assert Rule(credit="to go").advantages(gaps, 9.0, 1.0) == pytest.approx([-1.5, -2.0, 1.0])
    assert Rule(clip=1.0).advantages(gaps, 9.0, 1.0) == pytest.approx([0.5, -1.0, 1.0])
    both = Rule(reward=True, failed=True)
    assert both.advantages(gaps, 0.25, 0.0) == pytest.approx([0.75, -2.75, 1.25])
    assert both.advantages(gaps, 0.25, 1.0) == pytest.approx([0.25] * 3)


def test_the_answer_is_shown_as_a_turn_before_the_question():
    turns = (
        {"role": "system", "content": "Sums."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is"},
    )
    shown = with_turn(Example("x", turns, answer="4"))
    found = [m["content"] for m in shown.messages]
    assert found == ["Sums.", "2 + 2?", "4", "2 + 2?", "It is"]


def test_the_hint_follows_the_question_and_not_the_begun_turn():
    turns = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"})
    hinted = with_hint(Example("x", turns, answer=4), " It is {answer}.")
    assert [m["content"] for m in hinted.messages] == ["2 + 2? It is 4.", "It is"]
