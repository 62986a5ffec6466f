"""Turns a loaded model into a policy: precision, adapters, and MLX as its first engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from localrl.backend import mx
from localrl.engines.floats import Prompts, settle_floats
from localrl.engines.mlx.activations import use_fast_swiglu
from localrl.engines.mlx.engine import open_engine
from localrl.engines.mlx.recurrent import use_chunks
from localrl.errors import ConfigError
from localrl.policy.lora import attach, fill
from localrl.policy.model import LoadedModel, Policy
from localrl.policy.precision import dequantise


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
    dtype: str | None = None,
    prompts: Prompts = (),
) -> Policy:
    """Make a policy of this model in place: base frozen, adapters attached, see `lora.attach`.

    MLX computes it; `choose_engine` looks for a faster engine. Without `weights`, which come from
    an adapter in the folder `source`, the adapters have no effect yet. `for_cpu` uses a faster
    activation and, unless `dtype` says otherwise, casts all floats to float32; `dense` dequantises
    the quantised layers. All work in place, so there is one copy of the weights. `dtype` is
    `model.dtype`, or None to leave a GPU's floats as stored; `prompts` are a few prompts' tokens
    that float16 is tried with.
    """
    model, probe = loaded.model, loaded.tokenizer.plain_tokens()
    if for_cpu:
        _check_scales(model)
    use_chunks(model)
    if dense:
        dequantise(model, as_float32=dtype == "fp32" or (for_cpu and dtype in (None, "auto")))
    floats, checks = settle_floats(loaded, dtype, prompts or (probe,), for_cpu=for_cpu, dense=dense)
    if for_cpu:
        use_fast_swiglu(model)
    adapted = attach(model, rank=rank, scale=scale, seed=seed, layers=layers, keys=keys)
    if weights is not None:
        fill(model, weights, source)
    mx.eval(model.parameters())
    return Policy(model, loaded.tokenizer, adapted, open_engine(model, probe), floats, checks)


def _check_scales(model: Any) -> None:
    """Check that MLX's CPU backend has every format of the model.

    Raises: ConfigError for experts in nvfp4 with a scale of the whole tensor.
    """
    if any("global_scale" in module for module in model.modules()):
        raise ConfigError(
            "This model's experts are stored in nvfp4 with a global scale, which MLX computes only "
            "on a GPU. Take a conversion of it without (mlx_lm.convert makes one by default)."
        )
