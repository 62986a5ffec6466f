"""LoRA adapters: attach them to the linear layers of every block, switch them off, save them.

Paper: Hu et al. 2021, arXiv 2106.09685. File format: mlx-lm's adapter folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localrl.backend import mx, nn, tree_flatten, tree_unflatten
from localrl.errors import ConfigError


class LoRALinear(nn.Module):
    """A frozen linear layer plus `scale * x @ lora_a @ lora_b`.

    Unlike mlx-lm's layer the float32 master weights are cast to the type of `x`, not `x` to theirs:
    one small copy instead of one per activation.
    """

    def __init__(self, linear: Any, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        outputs, inputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)  # (in, r)
        self.lora_b = mx.zeros((rank, outputs))  # (r, out)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y + self.scale * ((x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype))


def linear_shape(linear: Any) -> tuple[int, int]:
    """(outputs, inputs) of a plain or quantised linear layer."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return outputs, inputs


def attach(model: Any, *, rank: int, scale: float, seed: int) -> list[str]:
    """Freeze the model and put adapters on all linear layers of its blocks.

    Returns the module paths inside a block, as mlx-lm's `keys`. The random half of each adapter
    depends on the seed and on which layer it is.

    Raises: ConfigError when the blocks hold no linear layer.
    """
    model.freeze()
    places = [
        (block, path, module)
        for block in model.layers
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    ]
    if not places:
        raise ConfigError("The model's blocks hold no linear layers, so there is nothing to adapt.")
    seeds = mx.random.split(mx.random.key(seed), len(places))
    for (block, path, module), key in zip(places, seeds, strict=True):
        block.update_modules(tree_unflatten([(path, LoRALinear(module, rank, scale, key))]))
    return list(dict.fromkeys(path for _, path, _ in places))


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within this context the model is the reference policy: its adapters have scale 0.

    A graph keeps the scale it was made with, so arrays made inside may be evaluated outside.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def save_adapter(model: Any, keys: list[str], folder: Path) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` as mlx-lm reads them.

    The configuration holds only what a reader needs: no paths, names or settings of this machine.
    The weights are first written beside their place and then renamed over it.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {
            "rank": layers[0].lora_a.shape[1],
            "scale": layers[0].scale,
            "dropout": 0.0,
            "keys": keys,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights: Any = dict(tree_flatten(model.trainable_parameters()))
    fresh = folder / "adapters.tmp.safetensors"
    mx.save_safetensors(str(fresh), weights)
    fresh.replace(folder / "adapters.safetensors")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
