"""LoRA adapters: attach them to layers of a model's blocks, fill them, switch them off.

Linear layers and stacked experts can have adapters; the experts only if they are named, since each
of hundreds has its own. Paper: Hu et al. 2021, arXiv 2106.09685. For adapter files see
`localrl.export.adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from localrl.backend import mx, nn, tree_flatten, tree_unflatten
from localrl.config import closest
from localrl.errors import ConfigError


class Prepared(Protocol):
    """A faster way to compute one adapted layer, prepared by an engine from its weights."""

    def fits(self, layer: LoRALinear, x: mx.array) -> bool:
        """Return True if it was prepared from the layer's present weights, for such an input."""
        ...

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the layer."""
        ...


class LoRALinear(nn.Module):
    """A frozen linear layer plus `scale * x @ lora_a @ lora_b`.

    Unlike in mlx-lm's layer, the float32 master weights are cast to the dtype of `x`, not the
    other way round: one small copy instead of one per activation. `addmm` adds to the frozen
    layer's output before it rounds, in one kernel.
    """

    prepared: Prepared | None = None
    """Used while it fits: never in a differentiated function, whose weights are other arrays, nor
    after an update."""

    def __init__(self, linear: Any, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        outputs, inputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)  # (in, r)
        self.lora_b = mx.zeros((rank, outputs))  # (r, out)

    def __call__(self, x: mx.array) -> mx.array:
        if self.prepared is not None and self.prepared.fits(self, x):
            return self.prepared(x)
        y = self.linear(x)
        lora_b = (self.scale * self.lora_b).astype(x.dtype)  # cheaper than scaling the output
        product = x.reshape(-1, x.shape[-1]) @ self.lora_a.astype(x.dtype)
        return mx.addmm(y.reshape(-1, y.shape[-1]), product, lora_b).reshape(y.shape)

    @property
    def factors(self) -> tuple[mx.array, mx.array]:
        """A (rank, inputs) and B (outputs, rank); the weight changes by `scale * B @ A`."""
        return self.lora_a.T, self.lora_b.T


class LoRAExperts(nn.Module):
    """Frozen stacked experts plus, for each of them, `scale * B @ A @ x`.

    Shapes and sums are those of mlx-lm's `LoRASwitchLinear`. A position needs the adapters of a few
    of all experts, so here the activations are cast to float32, not the adapters to the dtype of
    `x`.
    """

    def __init__(self, linear: Any, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        experts, outputs, inputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs), key=key)
        self.lora_b = mx.zeros((experts, outputs, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        chosen: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = mx.gather_mm(x.astype(mx.float32), self.lora_a.swapaxes(-1, -2), **chosen)
        z = mx.gather_mm(z, self.lora_b.swapaxes(-1, -2), **chosen)
        return y + (self.scale * z).astype(y.dtype)

    @property
    def factors(self) -> tuple[mx.array, mx.array]:
        """A (experts, rank, inputs) and B (experts, outputs, rank), as in `LoRALinear.factors`."""
        return self.lora_a, self.lora_b


LoRALayer = LoRALinear | LoRAExperts


def adapted_layers(model: Any) -> list[tuple[str, LoRALayer]]:
    """List the adapted layers with their paths."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALayer)]


def linear_shape(linear: Any) -> tuple[int, ...]:
    """Return (outputs, inputs) of a linear layer, or (experts, outputs, inputs) of stacked experts.

    Quantised or not: weights of any number of bits are packed into numbers of 32.
    """
    *before, inputs = linear.weight.shape
    packed = "scales" in linear
    return (*before, inputs * 32 // linear.bits if packed else inputs)


def attach(
    model: Any,
    *,
    rank: int,
    scale: float,
    seed: int,
    layers: int = 0,
    keys: Collection[str] = (),
) -> list[str]:
    """Freeze the model and attach adapters to layers of its last `layers` blocks (0: all).

    keys: module paths inside a block, of linear layers or stacked experts; if empty, all linear
    layers except routers of experts. The random matrix of each adapter depends only on the seed and
    the layer, not on what else is adapted.

    Returns: the paths, as mlx-lm's `keys`.

    Raises: ConfigError if there are no such blocks or layers.
    """
    model.freeze()
    blocks = len(model.layers)
    if layers > blocks:
        raise ConfigError(f"lora.layers is {layers}; the model has {blocks} blocks (0: all).")
    places = [
        (index, path, module)
        for index, block in enumerate(model.layers)
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) or is_experts(module)
    ]
    first = blocks - layers if layers else 0
    chosen = _choose(model, {path for index, path, _ in places if index >= first}, set(keys))
    if not chosen:
        raise ConfigError("The model's blocks have no linear layers: there is nothing to adapt.")
    seeds = mx.random.split(mx.random.key(seed), len(places))
    adapted: dict[str, None] = {}
    for (index, path, module), key in zip(places, seeds, strict=True):
        if index >= first and path in chosen:
            kind = LoRAExperts if is_experts(module) else LoRALinear
            adapter = kind(module, rank, scale, key)
            model.layers[index].update_modules(tree_unflatten([(path, adapter)]))
            adapted[path] = None
    return list(adapted)


def fill(model: Any, weights: Mapping[str, mx.array], source: object) -> None:
    """Load these weights into the attached adapters, in float32; `source` is for error messages.

    Raises: ConfigError if names or shapes do not exactly match the model's adapters.
    """
    parameters: dict[str, Any] = dict(tree_flatten(model.trainable_parameters()))
    wanted = {name: array.shape for name, array in parameters.items()}
    for name in sorted(wanted.keys() | weights.keys()):
        have = f"{list(weights[name].shape)}" if name in weights else "no such tensor"
        need = f"{list(wanted[name])}" if name in wanted else "no such adapter"
        if have != need:
            raise ConfigError(
                f"The adapter in {source} does not fit this model: {name} is {have} in the adapter "
                f"and {need} in the model. Pass the model it was trained on with --model."
            )
    model.load_weights([(n, w.astype(mx.float32)) for n, w in weights.items()], strict=False)


def is_experts(module: Any) -> bool:
    """Return True for the stacked weights of experts."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (SwitchLinear, QuantizedSwitchLinear))


def experts_note(model: Any) -> str | None:
    """Say how many of a mixture's weights are adapted; None if none of its experts are left out."""
    adapted = [layer.linear for _, layer in adapted_layers(model)]
    left_out = {
        path: None
        for block in model.layers
        for path, module in block.named_modules()
        if is_experts(module) and not any(module is linear for linear in adapted)
    }
    if not left_out:
        return None
    matrices = [m for m in model.modules() if "weight" in m and m.weight.ndim > 1]
    mine, total = (sum(math.prod(linear_shape(m)) for m in part) for part in (adapted, matrices))
    return (
        f"on layers of {mine / 1e6:,.2f} of {total / 1e6:,.2f} million weights; experts have none "
        f"unless lora.keys names them: {', '.join(left_out)}"
    )


def _choose(model: Any, paths: set[str], keys: set[str]) -> set[str]:
    """Choose the paths to adapt among those of linear layers and experts."""
    for key in sorted(keys - paths):
        raise ConfigError(
            f"lora.keys contains {key!r}, which is not a linear layer of the adapted blocks."
            f"{closest(key, paths)} Choose from {', '.join(sorted(paths))}."
        )
    experts = {path for block in model.layers for path, m in block.named_modules() if is_experts(m)}
    return keys or paths - experts - _routers(model)


def _routers(model: Any) -> set[str]:
    """Find the paths of linear layers that route among stacked experts.

    Training them lets tokens change experts between sampler and update, which makes ratios jump.
    Routers are the layers next to experts with as many outputs as experts, or one, and every
    layer named `router`.
    """
    found: set[str] = set()
    for block in model.layers:
        modules = dict(block.named_modules())
        experts = {
            path.rsplit(".", 2)[0]: linear_shape(module)[0]
            for path, module in modules.items()
            if is_experts(module)
        }
        for path, module in modules.items():
            if experts and isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                beside = [n for owner, n in experts.items() if path.startswith(f"{owner}.")]
                chooses = linear_shape(module)[0] in {1, *beside} and bool(beside)
                if chooses or "router" in path.split("."):
                    found.add(path)
    return found


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Turn the model into that without adapters within this context, by setting their scales to 0.

    A graph keeps the scale it was built with, so arrays built inside may be evaluated outside.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


@contextmanager
def other_adapters(model: Any, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """Give the adapters other weights within this context, by name as in `fill`.

    A graph keeps the arrays it was built with, so arrays built inside may be evaluated outside.
    """
    own: Any = tree_flatten(model.trainable_parameters())
    try:
        model.load_weights(list(weights.items()), strict=False)
        yield
    finally:
        model.load_weights(own, strict=False)
