"""A table of MLX's error messages when memory or the GPU fails, and how to recover from each.

An allocation refused before work is queued leaves everything unchanged, so the step can be retried
with less memory. After a failed command buffer results may read as zeros, earlier ones too, and an
error may surface late: nothing since the last finished step can be trusted.

macOS 26 also ends command buffers that keep a shown display from being drawn. Smaller batches do
not help against that (public reports of LoRA training with one row), so it is a kind of its own.
"""

from __future__ import annotations

from typing import Literal, get_args

Failure = Literal["refused", "poisoned", "watchdog"]
"""The kinds, mildest first. After all but "refused", results cannot be trusted."""
KINDS: tuple[Failure, ...] = get_args(Failure)

FAILURES: tuple[tuple[str, Failure, str], ...] = (
    ("[malloc] Unable to allocate", "refused", "mlx 0.32, CUDA; the CPU may die of SIGSEGV"),
    ("[malloc_or_wait] Unable to allocate", "refused", "mlx 0.22 and earlier"),
    ("[metal::malloc] Attempting to allocate", "refused", "mlx 0.32, Metal: a buffer too large"),
    ("[metal::malloc] Resource limit (", "poisoned", "mlx 0.32, Metal: too many live buffers"),
    ("Resource limit (499000) exceeded", "poisoned", "mlx 0.2x, Metal: too many live buffers"),
    ("Command buffer execution failed", "poisoned", "mlx 0.32, Metal: memory or a hang"),
    ("Insufficient Memory", "poisoned", "macOS, kIOGPUCommandBufferCallbackErrorOutOfMemory"),
    ("Impacting Interactivity", "watchdog", "macOS, the GPU's watchdog while a display is on"),
    ("ErrorImpactingInteractivity", "watchdog", "macOS, the same by its code's name"),
    ("kIOGPUCommandBufferCallbackError", "poisoned", "macOS, any other failed command buffer"),
    ("GPU Timeout Error", "poisoned", "macOS, a buffer ran some 5 s: smaller ones help"),
    ("GPU Hang Error", "poisoned", "macOS"),
)
"""Part of the message, its meaning, and the place where it was seen or is in the source."""


def failure_of(error: BaseException) -> Failure | None:
    """Classify an error by the gravest kind it names; None if it is about something else."""
    if isinstance(error, MemoryError):
        return "refused"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    found = {kind for part, kind, _ in FAILURES if part in text}
    return next((kind for kind in reversed(KINDS) if kind in found), None)


def doubtful(error: BaseException) -> bool:
    """Return True if results computed before the error may be wrong."""
    return failure_of(error) not in (None, "refused")
