"""Body and head: a float32 head beside 16-bit states, and logits that are not numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from localrl.backend import mx, tree_flatten
from localrl.engines.choose import choose_engine
from localrl.engines.mlx.logprobs import head_logprobs
from localrl.engines.mlx.network import Float32Head, open_network
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.policy.model import load_model
from localrl.policy.precision import cast_floats

TOKENS = mx.array([[5, 9, 30, 7, 41, 12]])


def loaded(folder, kind=mx.bfloat16, **changes):
    loaded = load_model(tiny.make_folder(folder, **changes))
    cast_floats(loaded.model, kind)
    return loaded


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_head_computes_float32_from_the_same_packed_weights(tmp_path, tied, kind):
    model = loaded(tmp_path / "model", kind, tie_word_embeddings=tied).model
    network = open_network(model)
    assert isinstance(network.head, Float32Head)
    assert network.hidden is not None
    states = network.hidden(TOKENS)[0]
    assert states.dtype == kind
    logits = network.head(states)
    assert logits.dtype == mx.float32
    layer = model.model.embed_tokens if tied else model.lm_head
    weight = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), 32, 4
    )
    expected = np.array(states.astype(mx.float32)) @ np.array(weight).T
    np.testing.assert_allclose(np.array(logits), expected, atol=1e-5)
    assert network.head._layer is layer
    kinds = {a.dtype for _, a in tree_flatten(model.parameters())}
    assert kinds == {kind, mx.uint32}


def test_its_gradient_is_that_of_float32(tmp_path):
    network = open_network(loaded(tmp_path / "model").model)
    assert isinstance(network.head, Float32Head)
    head, states = network.head, network.hidden(TOKENS)[0, :-1]

    def score(states):
        return head_logprobs(head, states, TOKENS[0, 1:], 0.8, 2).sum()

    exact = mx.grad(score)(states.astype(mx.float32))
    found = mx.grad(score)(states)
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(
        np.array(found.astype(mx.float32)), np.array(exact), atol=2e-2, rtol=1e-2
    )


@pytest.mark.parametrize(("bits", "kind"), [(None, mx.bfloat16), (4, mx.float32)])
def test_other_heads_stay_what_they_are(tmp_path, bits, kind):
    network = open_network(loaded(tmp_path / "model", kind, bits=bits).model)
    assert network.hidden is not None
    assert not isinstance(network.head, Float32Head)


def test_logits_that_are_not_numbers_cost_no_head_chunks_and_end_the_run(tmp_path):
    """The model is at fault, not the way it is cut."""
    made = loaded(tmp_path / "model")
    norm = made.model.layers[1].input_layernorm
    norm.weight = norm.weight * mx.nan
    policy = make_policy(made, rank=2, scale=1.0, seed=0, for_cpu=False, dense=False)
    assert policy.engine.splits_head
    with pytest.raises(
        ConfigError, match=r"weights are not finite: model\.layers\.1\.input_layernorm"
    ):
        choose_engine(policy, "mlx")


class OwnHead:
    """A family whose logits are those of a head that is not its `lm_head`."""

    def __init__(self, model):
        self.model, self.lm_head, self.own = model.model, lambda x: x * mx.nan, model

    def __contains__(self, name):
        return name == "lm_head"

    def __call__(self, tokens):
        return self.own(tokens)


def test_parts_that_are_not_numbers_are_not_used_and_told(policy):
    network = open_network(OwnHead(policy.model))
    assert network.hidden is None
    assert np.isnan(network.split.value)
    own = replace(policy.engine.network, hidden=None, head=None, split=network.split)
    told: list[str] = []
    choose_engine(replace(policy, engine=replace(policy.engine, network=own)), "mlx", told.append)
    assert "body and head give logits that are not numbers" in told[0]
