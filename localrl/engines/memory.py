"""The memory models of the engines: what `memory.estimate` asks about prefill and update."""

from __future__ import annotations

from localrl.engines.cpu.memory import CPUMemory
from localrl.engines.mlx.memory import MLXMemory
from localrl.memory.estimate import EngineMemory

BY_NAME: dict[str, EngineMemory] = {"cpu": CPUMemory(), "mlx": MLXMemory()}


def engines_for(setting: str) -> tuple[EngineMemory, ...]:
    """Those that `model.engine` leaves open, the preferred one first; MLX computes every model."""
    return (BY_NAME["mlx"],) if setting == "mlx" else tuple(BY_NAME.values())
