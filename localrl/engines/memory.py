"""The engines' memory models, which `memory.estimate` uses for prefill and update."""

from __future__ import annotations

from localrl.engines.cpu.memory import CPUMemory
from localrl.engines.mlx.memory import MLXMemory, recomputes_scores
from localrl.memory.estimate import EngineMemory


def engines_for(setting: str, *, device: str) -> tuple[EngineMemory, ...]:
    """Return the engines allowed by `model.engine`, preferred one first; MLX computes any model.

    device: "cpu", "metal" or "cuda"; on a GPU the CPU engine is never chosen, whatever the weights.
    """
    if device == "cpu" and setting != "mlx":
        return CPUMemory(), MLXMemory()
    return (MLXMemory(recomputes_scores(device)),)
