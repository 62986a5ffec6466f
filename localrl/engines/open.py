"""Turns a loaded model into a policy: precision, adapters, and MLX as its first engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from localrl.backend import mx
from localrl.engines.mlx.activations import use_fast_swiglu
from localrl.engines.mlx.engine import open_engine
from localrl.policy.lora import attach, fill
from localrl.policy.model import LoadedModel, Policy
from localrl.policy.precision import dequantise, to_float32


def make_policy(
    loaded: LoadedModel,
    *,
    rank: int,
    scale: float,
    seed: int,
    for_cpu: bool,
    dense: bool,
    layers: int = 0,
    keys: Collection[str] = (),
    weights: Mapping[str, mx.array] | None = None,
    source: object = None,
) -> Policy:
    """Make a policy of this model in place: base frozen, adapters attached, see `lora.attach`.

    MLX computes it; `choose_engine` looks for a faster engine. Without `weights`, which come from
    an adapter in the folder `source`, the adapters have no effect yet. `for_cpu` casts all floats
    to float32 and uses a faster activation, `dense` dequantises the quantised layers; both work in
    place, so there is one copy of the weights.
    """
    model = loaded.model
    if dense:
        dequantise(model, as_float32=for_cpu)
    if for_cpu:
        to_float32(model)
        use_fast_swiglu(model)
    adapted = attach(model, rank=rank, scale=scale, seed=seed, layers=layers, keys=keys)
    if weights is not None:
        fill(model, weights, source)
    mx.eval(model.parameters())
    return Policy(model, loaded.tokenizer, adapted, open_engine(model))
