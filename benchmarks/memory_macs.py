"""What `localrl plan` predicts for simulated Macs: the table of docs/memory.md.

    python benchmarks/memory_macs.py

Nothing here has run on a Mac: the machines are readings made up by `localrl.memory.machine.mac`.
"""

from __future__ import annotations

from collections.abc import Iterator

from localrl.config import RunConfig
from localrl.errors import MemoryBudgetError
from localrl.memory.limit import show
from localrl.memory.machine import mac
from localrl.training.memory_plan import outlook

MACS = (8, 16, 24, 64, 128)
MODELS = (
    "Qwen3-0.6B",
    "Qwen3-1.7B",
    "Qwen3-4B",
    "Qwen3-8B",
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct",
    "gemma-3-1b-it",
    "SmolLM2-360M-Instruct",
    "Qwen3.5-0.8B",
    "Qwen3.5-2B",
    "Qwen3.5-4B",
    "gemma-4-E2B-it",
    "LFM2.5-1.2B-Instruct",
    "granite-4.0-h-tiny",
)
GROUP = 8


def rows() -> Iterator[str]:
    """The table's lines."""
    yield "| 4-bit model | " + " | ".join(f"{size} GB" for size in MACS) + " |"
    yield "|---" * (1 + len(MACS)) + "|"
    for model in MODELS:
        yield f"| {model} | " + " | ".join(_cell(model, size) for size in MACS) + " |"


def _cell(model: str, size: int) -> str:
    settings = {"model.path": f"mlx-community/{model}-4bit", "rollout.group_size": GROUP}
    try:
        found = outlook(RunConfig.create(settings), mac(size))
    except MemoryBudgetError:
        return "does not fit"
    plan = found.plan
    told = [f"{plan.decode_rows} / {plan.micro_rows}", show(found.estimate.peak)]
    if plan.grad_checkpoint:
        told.insert(1, "recomputed")
    if plan.max_completion_tokens < found.request.plan.max_completion_tokens:
        told.insert(1, f"{plan.max_completion_tokens} tokens")
    return ", ".join(told)


if __name__ == "__main__":
    print("\n".join(rows()))
