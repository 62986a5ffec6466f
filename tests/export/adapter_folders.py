"""Adapter folders for tests: written by localrl, as others leave them, and changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny

from localrl.backend import mx
from localrl.engines.open import make_policy
from localrl.export.adapters import adapter_of, write_adapter
from localrl.policy.model import load_model


def a_policy(folder, *, rank=4, stirred=True, **options):
    policy = make_policy(
        load_model(folder), rank=rank, scale=2.0, seed=0, for_cpu=True, dense=False, **options
    )
    if stirred:
        tiny.stir(policy.model, seed=1)
    return policy


def write(model, folder) -> Path:
    assert write_adapter(adapter_of(a_policy(model).model, base_id="Some/Model"), folder) is None
    return folder


def write_foreign(model, folder) -> Path:
    """As mlx-lm leaves one: without our checksums and PEFT's half."""
    write(model, folder)
    (folder / "localrl.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    return folder


def equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(np.array(array), np.array(other[name]))


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(path, change):
    weights = mx.load(str(path))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
