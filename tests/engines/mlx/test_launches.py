"""The kernels that a decode step launches on a GPU, counted in its graph.

A block of Llama alone has 18: seven products with weights, two norms, two rope, attention, two
appends to the cache, the cache's offset, the activation and two additions.
"""

from __future__ import annotations

import gpu_kernels
import numpy as np
import pytest
import tiny

from localrl.backend import mx
from localrl.engines.mlx import decode
from localrl.engines.mlx.adapters import find_siblings, prepare
from localrl.engines.mlx.network import open_network
from localrl.engines.mlx.prefix_cache import use_shared_prompts
from localrl.engines.open import make_policy
from localrl.policy.model import load_model

TOKENS = np.array([5, 6, 7, 8])


def step(folder, layers, *, adapted, prepared=True, shared=False):
    """Count the kernels of one step of four rows behind two prompts, in 16 bits."""
    loaded = load_model(tiny.make_folder(folder, model_type="llama", num_hidden_layers=layers))
    model = loaded.model
    model.set_dtype(mx.float16)
    if adapted:
        make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=False, dense=False)
        if prepared:
            prepare(find_siblings(model))
    if shared:
        use_shared_prompts(model)
    prefilled = decode.prefill(open_network(model), TOKENS[None].repeat(2, 0), [4, 4])
    state = prefilled.fork(np.array([0, 0, 1, 1]), [0, 1] if shared else None)
    state.step(TOKENS)
    state.wait()
    with gpu_kernels.fused(model):
        state.step(TOKENS)
        drawn = decode.draw(state.next, np.full(4, 0.5), 1.0)
        caches = [a for layer in state.cache for a in layer.state if isinstance(a, mx.array)]
        return sum(gpu_kernels.kernels([*drawn, *caches], folder).values())


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({"adapted": False}, 18),
        ({"adapted": True, "prepared": False}, 18 + 7 * 5),
        ({"adapted": True}, 26),
        ({"adapted": True, "shared": True}, 32),
    ],
)
def test_kernels_of_a_block(tmp_path, options, block):
    few, more = (step(tmp_path / str(n), n, **options) for n in (2, 3))
    assert more - few == block


def test_adapters_add_less_than_half_to_a_step(tmp_path):
    alone = step(tmp_path / "alone", 30, adapted=False)
    adapted = step(tmp_path / "adapted", 30, adapted=True)
    assert adapted <= 1.45 * alone
