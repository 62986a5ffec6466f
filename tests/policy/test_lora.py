from __future__ import annotations

import numpy as np
import pytest
import tiny

from localrl.backend import mx, tree_flatten
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.policy.model import load_model


def logits(model):
    return np.array(model(mx.array([[1, 5, 9, 2, 7]])))


@pytest.mark.parametrize("dense", [True, False])
def test_fresh_adapters_change_nothing(tiny_folder, dense):
    bare = load_model(tiny_folder).model
    policy = make_policy(
        load_model(tiny_folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=dense
    )
    np.testing.assert_allclose(logits(policy.model), logits(bare), atol=2e-5)


def test_all_linear_layers_of_the_blocks_and_nothing_else(policy):
    names = {name for name, _ in tree_flatten(policy.model.trainable_parameters())}
    assert len(names) == 2 * 2 * 7  # lora_a and lora_b of 7 layers in 2 blocks
    assert all(name.startswith("model.layers.") for name in names)
    assert set(policy.lora_keys) == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }


def test_the_random_half_follows_the_seed(tiny_folder):
    def first(seed):
        policy = make_policy(
            load_model(tiny_folder), rank=4, scale=2.0, seed=seed, for_cpu=True, dense=True
        )
        return np.array(policy.model.layers[0].mlp.up_proj.lora_a)

    np.testing.assert_array_equal(first(3), first(3))
    assert not np.array_equal(first(3), first(4))


def adapted(model):
    return {name.rpartition(".")[0] for name, _ in tree_flatten(model.trainable_parameters())}


def with_options(folder, **options):
    return make_policy(
        load_model(folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=False, **options
    )


def test_layers_count_from_the_last_block(tiny_folder):
    policy = with_options(tiny_folder, layers=1)
    assert len(adapted(policy.model)) == 7
    assert all(name.startswith("model.layers.1.") for name in adapted(policy.model))


def test_keys_choose_layers_in_every_block(tiny_folder):
    policy = with_options(tiny_folder, keys=("self_attn.q_proj", "mlp.up_proj"))
    assert adapted(policy.model) == {
        f"model.layers.{n}.{path}" for n in (0, 1) for path in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert set(policy.lora_keys) == {"self_attn.q_proj", "mlp.up_proj"}


def test_the_random_half_does_not_depend_on_what_else_is_adapted(tiny_folder):
    def last(**options):
        return np.array(with_options(tiny_folder, **options).model.layers[1].mlp.up_proj.lora_a)

    np.testing.assert_array_equal(last(), last(layers=1, keys=("mlp.up_proj",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "lora.layers is 3; the model has 2 blocks"),
        ({"keys": ("self_attn.qproj",)}, "Did you mean 'self_attn.q_proj'"),
        ({"keys": ("q_proj",)}, "contains 'q_proj', which is not a linear layer"),
    ],
)
def test_what_is_not_there_cannot_be_adapted(tiny_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        with_options(tiny_folder, **options)


def test_routers_and_experts_have_no_adapters_unless_they_are_named(tmp_path):
    folder = tiny.make_folder(tmp_path / "mixture", **tiny.FAMILIES["qwen3_moe"])
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert set(with_options(folder).lora_keys) == attention
    assert with_options(folder, keys=("mlp.gate",)).lora_keys == ["mlp.gate"]
    experts = with_options(folder, keys=("mlp.switch_mlp.up_proj",))
    assert experts.lora_keys == ["mlp.switch_mlp.up_proj"]
    shapes = {array.shape for _, array in tree_flatten(experts.model.trainable_parameters())}
    assert shapes == {(4, 4, 64), (4, 32, 4)}  # experts, rank, inputs; experts, outputs, rank
    with pytest.raises(ConfigError, match="not a linear layer"):
        with_options(folder, keys=("mlp.switch_mlp",))


def test_an_adapter_of_another_size_is_refused(tiny_folder):
    policy = with_options(tiny_folder)
    weights = dict(tree_flatten(policy.model.trainable_parameters()))
    name = "model.layers.0.mlp.up_proj.lora_a"
    weights[name] = mx.zeros((32, 4))
    with pytest.raises(ConfigError, match=r"up_proj.lora_a is \[32, 4\] in .* and \[64, 4\] in"):
        with_options(tiny_folder, weights=weights, source="somewhere")
