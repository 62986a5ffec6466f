"""Tiny policies that NumPy computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from localrl.backend import mx, tree_flatten
from localrl.engines.choose import choose_engine
from localrl.engines.cpu import attention, buffers, levels
from localrl.engines.mlx.engine import MLXEngine
from localrl.engines.mlx.network import open_network
from localrl.engines.open import make_policy
from localrl.policy.model import Policy, load_model

NAMES = ("qwen3", "llama", "qwen2", "smollm3")


def array_policy(folder: Path, name: str, **options: Any) -> Policy:
    """A checked policy of the family; its norms have weights of their own, its adapters too.

    options: of `make_policy`.
    """
    loaded = load_model(tiny.make_folder(folder, **tiny.FAMILIES[name]))
    wish = {"rank": 4, "scale": 2.0, "seed": 0, "for_cpu": True, "dense": True, **options}
    policy = make_policy(loaded, **wish)
    tiny.stir(policy.model, 0)
    draws = np.random.default_rng(1)
    norms = [
        (path, mx.array(draws.uniform(0.5, 1.5, array.shape).astype(np.float32)))
        for path, array in tree_flatten(policy.model.parameters())
        if "norm" in path
    ]
    policy.model.load_weights(norms, strict=False)
    policy = choose_engine(policy)
    assert policy.engine.name == "cpu"
    return policy


def in_mlx(policy: Policy) -> Policy:
    """The same one, computed by MLX."""
    return replace(policy, engine=MLXEngine(open_network(policy.model)))


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever room is given holds no numbers before it is written."""

    def spoilt(shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    modules = (attention, levels, buffers)
    for module in modules:
        monkeypatch.setattr(module, "empty", spoilt)
