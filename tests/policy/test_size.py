"""The size of adapters beside the weights, against products that are really made."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from localrl.engines.open import make_policy
from localrl.policy.lora import LoRALinear
from localrl.policy.model import load_model
from localrl.policy.size import relative_size, weight_norms


@pytest.mark.parametrize("bits", [None, 4])
def test_the_size_is_that_of_the_products(tmp_path, bits):
    loaded = load_model(tiny.make_folder(tmp_path / "model", bits=bits))
    policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=False, dense=False)
    norms = weight_norms(policy.model)
    assert relative_size(policy.model, norms) == 0.0
    tiny.stir(policy.model, 0)
    dense = load_model(tmp_path / "model")
    whole = make_policy(dense, rank=4, scale=2.0, seed=0, for_cpu=True, dense=True)
    layers = [m for m in policy.model.modules() if isinstance(m, LoRALinear)]
    weights = [m.linear.weight for m in whole.model.modules() if isinstance(m, LoRALinear)]
    expected = [
        np.linalg.norm(2.0 * np.array(layer.lora_a) @ np.array(layer.lora_b))
        / np.linalg.norm(np.array(weight))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    assert len(expected) == 14
    assert relative_size(policy.model, norms) == pytest.approx(np.mean(expected), rel=1e-3)
