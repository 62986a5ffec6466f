"""SmolLM2-135M answers, and both engines compute it alike."""

from __future__ import annotations

import numpy as np
import pytest
from exact import assert_exact, logprob_table

from localrl.engines.choose import choose_engine
from localrl.engines.open import make_policy
from localrl.policy.model import load_model
from localrl.policy.scoring import group_logprobs
from localrl.records import Example, Group, Leaf, Node
from localrl.rollouts.decode import Decoder
from localrl.rollouts.groups import Shape, sample_groups


@pytest.fixture(scope="module")
def base(folder):
    """The model as training has it on the CPU; its adapters change nothing.

    Of this module alone: half a gigabyte that the peaks of other tests would count.
    """
    policy = choose_engine(
        make_policy(load_model(folder), rank=16, scale=2.0, seed=0, for_cpu=True, dense=True)
    )
    assert policy.engine.name == "cpu"
    return policy


TEXTS = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "def add(a, b):\n    return a + b  # 12 + 34 = 46\n",
    "naïve Größe, 数学, \N{SMILING FACE WITH OPEN MOUTH} and 3.14159",
)


def example(text):
    return Example(text, ({"role": "user", "content": text},))


def complete(policy, texts, *, temperature, group, tokens):
    """Groups of completions of these prompts."""
    examples = [example(text) for text in texts]
    return sample_groups(
        Decoder(policy, temperature, 16),
        examples,
        [policy.tokenizer.encode(e.messages) for e in examples],
        Shape(group, group),
        rule=None,
        max_completion_tokens=tokens,
        seed=0,
        step=1,
        version=0,
    )


@pytest.mark.parametrize("engine", ["cpu", "mlx"])
def test_it_knows_the_capital_of_france(base, engine):
    policy = base if engine == "cpu" else choose_engine(base, "mlx")
    texts = ["What is the capital of France?"]
    [group] = complete(policy, texts, temperature=0.0, group=1, tokens=12)
    assert group.leaves[0].text == "The capital of France is Paris."


def test_what_is_sampled_has_the_log_probabilities_of_mlx(base):
    texts = ["What is 7 + 5?", "Name a colour of the rainbow."]
    assert_exact(base, complete(base, texts, temperature=0.7, group=2, tokens=16), 0.7)


def test_what_is_scored_has_the_log_probabilities_of_mlx(base):
    """Texts of several kinds, as if they had been sampled."""
    groups = [as_completion(base.tokenizer, text) for text in TEXTS]
    found = group_logprobs(base, groups, shared=True, micro_rows=4, head_chunk=64, temperature=1.0)
    for group, [own] in zip(groups, found, strict=True):
        completion = group.completion(0)
        table = logprob_table(base, group, completion)
        chosen = table[np.arange(len(completion)), completion.token_ids]
        np.testing.assert_allclose(own, chosen, atol=1e-4)


def as_completion(tokenizer, text):
    """A group whose one completion is the text."""
    ids = np.array(tokenizer.encode_text(text), np.int32)
    zeros = np.zeros(len(ids), np.float32)
    node = Node(-1, ids, np.ones(len(ids), bool), zeros, zeros)
    prompt = tokenizer.encode(example("Go on.").messages)
    return Group(example(text), prompt, (node,), (Leaf(0, "length", text),), 1)
