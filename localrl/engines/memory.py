"""The engines' memory models, which `memory.estimate` uses for prefill and update."""

from __future__ import annotations

from localrl.engines.cpu.memory import CPUMemory
from localrl.engines.mlx.memory import MLXMemory
from localrl.memory.estimate import EngineMemory

BY_NAME: dict[str, EngineMemory] = {"cpu": CPUMemory(), "mlx": MLXMemory()}


def engines_for(setting: str, *, on_cpu: bool) -> tuple[EngineMemory, ...]:
    """Return the engines allowed by `model.engine`, preferred one first; MLX computes any model.

    on_cpu: False on a GPU, where the CPU engine is never chosen, whatever the weights.
    """
    return tuple(BY_NAME.values()) if on_cpu and setting != "mlx" else (BY_NAME["mlx"],)
