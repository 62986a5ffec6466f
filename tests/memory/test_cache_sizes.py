"""What caches hold by the sizes of a model, against mlx-lm's own."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.engines.mlx.decode import CACHE_STEP, prefill
from localrl.engines.mlx.network import open_network
from localrl.memory.sizes import FULL, NONE, Sizes, kv_bytes, parameters, read_sizes
from localrl.policy.precision import to_float32

FAMILIES = {
    **tiny.FAMILIES,
    "olmo3": {"model_type": "olmo3", "sliding_window": 16, "num_hidden_layers": 5},
}


def config_of(name):
    return {**tiny.CONFIG, **FAMILIES[name]}


def caches(name, prompt, tokens):
    """Bytes of the caches of two rows with a prompt of that length, before and after decoding."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config_of(name))
    model = model_class(arguments.from_dict(config_of(name)))
    to_float32(model)
    tokens_of_two = np.ones((2, prompt), np.int32)
    cache = prefill(open_network(model), tokens_of_two, [prompt, prompt - 1]).cache
    counts = [sum(layer.nbytes for layer in cache)]
    for _ in range(tokens):
        model(mx.ones((2, 1), dtype=mx.int32), cache=cache)
        counts.append(sum(layer.nbytes for layer in cache))
    return counts


@pytest.mark.parametrize("prompt", [5, 8, 62, 64, 70])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "lfm2", "olmo3"])
def test_caches_hold_as_much_as_mlx_lms(name, prompt):
    found = read_sizes(config_of(name))
    for number, count in enumerate(caches(name, prompt, 14)):
        expected = kv_bytes(
            found, prompt + number, bytes_per_number=4, step=CACHE_STEP, prompt=prompt
        )
        assert 2 * expected == count, number


def test_caches_by_hand():
    found = Sizes("any", 64, 4, 2, 16, 128, 64, True, (FULL, 100, 8, NONE), state_numbers=30)
    # 65 tokens: 128 of the full layer, 100 and 8 of the windows, nothing, and the states.
    assert kv_bytes(found, 65, bytes_per_number=2) == 2 * (2 * 2 * 16 * (128 + 100 + 8) + 30)
    assert kv_bytes(found, 65, bytes_per_number=4, step=5) == 4 * (64 * (65 + 65 + 8) + 30)
    assert found.layers == 4
    with pytest.raises(ValueError, match="read_sizes"):
        parameters(found)
