"""Listed options give exact gradients, on a policy that is enumerated."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enumerated import (
    END,
    LONGEST,
    PAIRS,
    PROMPT,
    A,
    Block,
    estimate,
    exact_gradient,
    flattened,
    make_files,
    opened,
)

from localrl.backend import mx, nn
from localrl.errors import DataError
from localrl.records import Example

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from options import with_options

SOME = ("a", "sa", "", " a a", "s")
"""Three of them have a reward."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed")
    with opened(make_files(folder), folder / "run", PAIRS) as session:
        yield session


def listed(plain, name: str, texts) -> tuple[Any, Block]:
    """The session with the stages of this name, and a group with these options."""
    session = with_options(replace(plain), name)
    messages = ({"role": "user", "content": PROMPT},)
    example = Example("listed", messages, columns={"options": texts})
    return session, Block(session.sampler.collect(1, [example], 1), 1, 1)


def exact(model, name: str) -> np.ndarray:
    """Compute the gradient (P,) that a stage stands for, over SOME."""
    ids = {" ": 1, "a": 2, "s": 3}
    whole = [[A, *(ids[c] for c in text), END][: LONGEST + 1] for text in SOME]
    rewards = mx.array([float("s" not in text) for text in SOME])

    def value() -> Any:
        logprobs = []
        for tokens in whole:
            logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
            each = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            logprobs.append(each[mx.arange(len(tokens) - 1), mx.array(tokens[1:])].sum())
        p = mx.exp(mx.stack(logprobs))
        expected = (p * rewards).sum()
        return {
            "options": expected / p.sum(),
            "options in text": expected,
            "options in log text": mx.log(expected),
        }[name]

    return flattened(nn.value_and_grad(model, value)()[1])


def check_same(found: np.ndarray, known: np.ndarray) -> None:
    assert np.linalg.norm(found - known) < 1e-3 * np.linalg.norm(known)


def test_all_completions_as_options_give_the_gradient_that_sampling_estimates(plain):
    texts = ["".join(t) for n in range(LONGEST + 1) for t in product(" as", repeat=n)]
    session, block = listed(plain, "options in text", texts)
    check_same(estimate(session, block), exact_gradient(session.policy.model)[0])


@pytest.mark.parametrize("name", ["options", "options in text", "options in log text"])
def test_some_options_give_the_gradient_of_their_objective(plain, name):
    session, block = listed(plain, name, SOME)
    check_same(estimate(session, block), exact(session.policy.model, name))
    [group] = block.scored
    # Where the others add nothing, only the options with a reward are scored.
    assert len(group.rewards) == (5 if name == "options" else 3)


@pytest.mark.parametrize("texts", [(), ("a",), ("s", "sa")])
def test_options_that_teach_nothing_are_refused(plain, texts):
    with pytest.raises(DataError, match=r"options|reward"):
        listed(plain, "options in text", texts)
