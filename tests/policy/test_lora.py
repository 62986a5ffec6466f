from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from localrl.backend import mx, tree_flatten
from localrl.policy.lora import save_adapter
from localrl.policy.model import load_model, make_policy


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


def test_mlx_lm_reads_the_adapter(tmp_path, tiny_folder):
    from mlx_lm import load

    policy = make_policy(
        load_model(tiny_folder), rank=4, scale=2.0, seed=0, for_cpu=True, dense=True
    )
    tiny.stir(policy.model, seed=1)
    bare = logits(load_model(tiny_folder).model)
    save_adapter(policy.model, policy.lora_keys, tmp_path / "adapter")
    loaded = load(str(tiny_folder), adapter_path=str(tmp_path / "adapter"))[0]
    assert np.abs(logits(policy.model) - bare).max() > 0.01
    np.testing.assert_allclose(logits(loaded), logits(policy.model), atol=1e-4)


def test_the_adapter_config_holds_nothing_of_this_machine(tmp_path, policy):
    save_adapter(policy.model, policy.lora_keys, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config) == {"fine_tune_type", "num_layers", "lora_parameters"}
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
