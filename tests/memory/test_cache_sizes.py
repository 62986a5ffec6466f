"""What caches hold by the sizes of a model, against mlx-lm's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.engines.mlx.decode import CACHE_STEP, prefill
from localrl.engines.mlx.network import open_network
from localrl.memory.sizes import FULL, NONE, Sizes, kv_bytes, parameters, read_sizes
from localrl.policy.precision import cast_floats

FAMILIES = {
    **tiny.FAMILIES,
    "olmo3": {"model_type": "olmo3", "sliding_window": 16, "num_hidden_layers": 5},
}

HYBRIDS = ("lfm2", "qwen3_5", "granitemoehybrid")


def config_of(name):
    return {**tiny.CONFIG, **FAMILIES[name]}


def caches(name, prompt, tokens, dtype=mx.float32):
    """Bytes of the caches of two rows with a prompt of that length, before and after decoding."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config_of(name))
    model = model_class(arguments.from_dict(config_of(name)))
    cast_floats(model, dtype)
    tokens_of_two = np.ones((2, prompt), np.int32)
    cache = prefill(open_network(model), tokens_of_two, [prompt, prompt - 1]).cache
    counts = [sum(layer.nbytes for layer in cache)]
    for _ in range(tokens):
        model(mx.ones((2, 1), dtype=mx.int32), cache=cache)
        counts.append(sum(layer.nbytes for layer in cache))
    return counts


@pytest.mark.parametrize("prompt", [5, 8, 62, 64, 70])
@pytest.mark.parametrize("name", [*HYBRIDS, "qwen3", "gemma3_text", "gemma4_text", "olmo3"])
def test_caches_hold_as_much_as_mlx_lms(name, prompt):
    found = read_sizes(config_of(name))
    for number, count in enumerate(caches(name, prompt, 14)):
        expected = kv_bytes(
            found, prompt + number, bytes_per_number=4, step=CACHE_STEP, prompt=prompt
        )
        assert 2 * expected == count, number


@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrent_states_are_float32_in_any_model(name):
    found = read_sizes(config_of(name))
    for number, count in enumerate(caches(name, 9, 2, mx.bfloat16)):
        expected = kv_bytes(found, 9 + number, bytes_per_number=2, step=CACHE_STEP, prompt=9)
        assert 2 * expected == count, number


def test_caches_by_hand():
    found = Sizes("any", 64, 4, 2, 16, 128, 64, True, (FULL, 100, 8, NONE), tail_numbers=30)
    # 65 tokens: 128 of the full layer, 100 and 8 of the windows, nothing, and the states.
    assert kv_bytes(found, 65, bytes_per_number=2) == 2 * (2 * 2 * 16 * (128 + 100 + 8) + 30)
    assert kv_bytes(found, 65, bytes_per_number=4, step=5) == 4 * (64 * (65 + 65 + 8) + 30)
    states = replace(found, state_numbers=7)
    assert kv_bytes(states, 65, bytes_per_number=2) - kv_bytes(found, 65, bytes_per_number=2) == 28
    assert found.layers == 4
    with pytest.raises(ValueError, match="read_sizes"):
        parameters(found)
