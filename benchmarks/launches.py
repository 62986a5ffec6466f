"""Kernels that a decode step launches on a GPU, counted in its graph; needs no GPU.

    PYTHONPATH=tests python benchmarks/launches.py

A Llama of 30 blocks in 4 bits and float16, as SmolLM2-135M has, but narrow: widths change no count.
Sixteen rows of two prompts; the step with the draw of its tokens, no growth of the cache. Prints
one JSON object. `tests/gpu_kernels.py` says what is counted.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
import tiny

from localrl.backend import mx
from localrl.engines.choose import choose_engine
from localrl.engines.mlx import decode
from localrl.engines.open import make_policy
from localrl.policy.engine import DecodeState
from localrl.policy.model import load_model

ROWS = np.repeat([0, 1], 8)
TOKENS = np.arange(5, 21)


def states(folder: Path, adapters: bool) -> dict[str, DecodeState]:
    """Rows with copied and with shared prompts, and the model that computes them."""
    loaded = load_model(tiny.make_folder(folder, model_type="llama", num_hidden_layers=30))
    loaded.model.set_dtype(mx.float16)
    policy = make_policy(loaded, rank=4, scale=2.0, seed=0, for_cpu=False, dense=False)
    engine: Any = choose_engine(policy, "mlx").engine
    if not adapters:
        for block in loaded.model.layers:
            for module in block.modules():
                for name, child in list(module.items()):
                    if hasattr(child, "lora_a"):
                        module[name] = child["linear"]
    prompts = np.tile(TOKENS, (2, 1))
    prefilled = engine.prefill(prompts, [len(TOKENS)] * 2)
    return {"copied": prefilled.fork(ROWS, None), "shared": prefilled.fork(ROWS, [0, 1])}


def count(state: Any, folder: Path) -> int:
    """Kernels of one step and one draw of these rows."""
    state.step(TOKENS)
    state.wait()
    model = state.model if hasattr(state, "model") else state.network.model
    with gpu_kernels.fused(model):
        state.step(TOKENS)
        drawn = decode.draw(state.next, np.full(len(ROWS), 0.5), 1.0)
        caches = [a for layer in state.cache for a in layer.state if isinstance(a, mx.array)]
        return sum(gpu_kernels.kernels([*drawn, *caches], folder).values())


def main() -> None:
    """Count all kinds of steps."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        alone, adapted = states(folder / "alone", False), states(folder / "adapted", True)
        found = {
            "model": count(alone["copied"], folder),
            "adapters": count(adapted["copied"], folder),
            "adapters, shared prompts": count(adapted["shared"], folder),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
