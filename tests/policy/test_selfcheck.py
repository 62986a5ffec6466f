"""Self-checks: limits, the tokens they use, and float32 for as long as they run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny

from localrl.backend import mx, nn, tree_flatten
from localrl.embedded import EMBEDDED_MODELS, embedded_model_path
from localrl.errors import ConfigError
from localrl.policy.model import load_model
from localrl.policy.precision import cast_floats, float32_activations, to_float32
from localrl.policy.selfcheck import Check, judge
from localrl.policy.tokenizer import PLAIN_TOKENS, load_tokenizer


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.0, "ok"), (1e-2, "ok"), (0.03, "warn"), (0.05, "warn"), (0.39, "refuse"),
     (math.inf, "refuse"), (math.nan, "refuse")],
)  # fmt: skip
def test_a_value_beside_its_limits(value, verdict):
    check = Check("padded_prompts", value, 1e-2, 5e-2)
    assert check.verdict == check.record()["verdict"] == verdict
    assert check.accepted == (verdict != "refuse")


def test_what_follows_from_a_value():
    told: list[str] = []
    good, odd, bad = (Check("rows", value, 1e-2, 5e-2) for value in (1e-6, 0.03, 0.39))
    judge(good, "Rows differ.", "Use others.", strict=True, warn=told.append)
    assert told == []
    judge(odd, "Rows differ.", "Use others.", strict=True, warn=told.append)
    judge(bad, "Rows differ.", "Use others.", strict=False, warn=told.append)
    limits = "(warns above 0.01, refuses above 0.05)"
    assert told == [
        f"Rows differ. The self-check rows found 0.03 {limits}. Rounding explains less, but it may "
        "do no harm.",
        f"Rows differ. The self-check rows found 0.39 {limits}. Use others.",
    ]
    with pytest.raises(ConfigError, match=r"found 0\.39.*Use others.*model\.selfcheck=warn"):
        judge(bad, "Rows differ.", "Use others.", strict=True, warn=told.append)


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_tokens_are_ordinary_ones_where_the_tokenizer_knows_them(name, tiny_folder):
    whole = load_tokenizer(tiny_folder)
    assert whole.decode(whole.plain_tokens()).startswith("the sum of 12 and 30")
    few = load_tokenizer(embedded_model_path(name))
    tokens = few.plain_tokens()
    assert len(tokens) >= PLAIN_TOKENS
    assert not set(few.inner.all_special_ids) & set(tokens[:8])
    assert few.decode(tokens).startswith("the sum of 12 and 30")


def test_a_tokenizer_that_knows_nothing_of_the_text(tmp_path):
    tokenizer = load_tokenizer(tiny.make_folder(tmp_path / "model", characters="()"))
    assert tokenizer.plain_tokens() == tuple(range(1, PLAIN_TOKENS + 1))


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_model_computes_in_float32_and_is_what_it_was(tmp_path, family, bits, kind):
    made = tiny.make_folder(tmp_path / "model", bits=bits, **tiny.FAMILIES[family])
    model, exact = load_model(made).model, load_model(made).model
    for one in (model, exact):
        cast_floats(one, kind)
    to_float32(exact)
    before = dict(tree_flatten(model.parameters()))
    tokens = mx.array([[5, 9, 30, 7, 41]])
    with float32_activations(model):
        found = model(tokens)
        assert found.dtype == mx.float32
        cached = model.make_cache() if hasattr(model, "make_cache") else None
        assert model(tokens, cache=cached).dtype == mx.float32
    # Gemma adds 1 to the weights of its norms, in their dtype.
    error = 2e-2 if family == "gemma3_text" else 1e-5
    np.testing.assert_allclose(np.array(found), np.array(exact(tokens)), atol=error, rtol=error)
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model(tokens).dtype == kind


def test_a_model_in_float32_is_left_alone(policy):
    embedding = policy.model.model.embed_tokens
    with float32_activations(policy.model):
        assert policy.model.model.embed_tokens is embedding
    assert isinstance(embedding, nn.Embedding)
