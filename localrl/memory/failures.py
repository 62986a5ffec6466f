"""A table of MLX's error messages when memory or the GPU fails, and how to recover from each.

An allocation refused before work is queued leaves everything unchanged, so the step can be retried
with less memory. After a failed command buffer results may read as zeros, earlier ones too, and an
error may surface late: nothing since the last finished step can be trusted.
"""

from __future__ import annotations

from typing import Literal

Failure = Literal["refused", "poisoned"]

FAILURES: tuple[tuple[str, Failure, str], ...] = (
    ("[malloc] Unable to allocate", "refused", "mlx 0.32, CUDA; the CPU may die of SIGSEGV"),
    ("[malloc_or_wait] Unable to allocate", "refused", "mlx 0.22 and earlier"),
    ("[metal::malloc] Attempting to allocate", "refused", "mlx 0.32, Metal: a buffer too large"),
    ("[metal::malloc] Resource limit (", "poisoned", "mlx 0.32, Metal: too many live buffers"),
    ("Resource limit (499000) exceeded", "poisoned", "mlx 0.2x, Metal: too many live buffers"),
    ("Command buffer execution failed", "poisoned", "mlx 0.32, Metal: memory, watchdog, hang"),
    ("Insufficient Memory", "poisoned", "macOS, kIOGPUCommandBufferCallbackErrorOutOfMemory"),
    ("Impacting Interactivity", "poisoned", "macOS, the GPU's watchdog while a display is on"),
    ("kIOGPUCommandBufferCallbackError", "poisoned", "macOS, any other failed command buffer"),
    ("GPU Timeout Error", "poisoned", "macOS, one kernel ran too long"),
    ("GPU Hang Error", "poisoned", "macOS"),
)
"""Part of the message, its meaning, and the place where it was seen or is in the source."""


def failure_of(error: BaseException) -> Failure | None:
    """Classify an error as a failure of memory or GPU; None if it is about something else."""
    if isinstance(error, MemoryError):
        return "refused"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    found = {kind for part, kind, _ in FAILURES if part in text}
    return "poisoned" if "poisoned" in found else "refused" if found else None
