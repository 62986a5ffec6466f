"""Measures whole training steps in the shapes of published figures, for `localrl bench --shape`.

The figures were published by others, on their machines and with their settings: other ranks,
losses and ways to count memory. They say which order of magnitude to expect, not who is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from localrl.backend import mx
from localrl.diagnostics.bench import BenchRequest, Opened, open_bench, sample, seconds
from localrl.diagnostics.bench_profile import finish, stepping
from localrl.errors import MemoryBudgetError
from localrl.records import Group


@dataclass(frozen=True)
class StepRate:
    """The rate of training steps of one prompt, in the units of the published figures."""

    rollout_tokens_per_s: float | None
    """Sampled tokens of all completions by the seconds of sampling them, prefill included."""
    update_s: float | None
    """Seconds of the rest of a step."""
    steps_per_s: float
    peak_bytes: float | None
    """Peak memory of MLX."""


@dataclass(frozen=True)
class PublishedRate:
    """A published rate."""

    tool: str
    rate: StepRate


@dataclass(frozen=True)
class PublishedShape:
    """The sizes of a step that others have published figures of."""

    model: str
    completions: int
    tokens: int
    """Length of each completion."""
    prompt_tokens: int
    source: str
    """Who measured the figures, where, and on what."""
    figures: tuple[PublishedRate, ...]


SHAPES: Mapping[str, PublishedShape] = {
    "qwen3-0.6b": PublishedShape(
        "mlx-community/Qwen3-0.6B-4bit",
        completions=4,
        tokens=256,
        prompt_tokens=19,
        source="README of inductiveML/mlxrl, measured by its author on an Apple M4 Max with MLX "
        "0.31.2: means of two times 95 steps",
        figures=(
            PublishedRate("mlx-lm-lora", StepRate(557.9, 0.592, 0.412, 5.32e9)),
            PublishedRate("mlxrl", StepRate(454.1, 1.282, 0.283, 6.25e9)),
            PublishedRate("mlx-tune", StepRate(142.2, 0.502, 0.130, 6.16e9)),
        ),
    ),
    "qwen3.5-0.8b": PublishedShape(
        "mlx-community/Qwen3.5-0.8B-4bit",
        completions=4,
        tokens=128,
        prompt_tokens=64,
        source="documentation of mlx-tune, measured by its author on an Apple M4 Pro with 48 GB: "
        "4.8 s a step; the length of the prompt is not published, 64 is ours",
        figures=(PublishedRate("mlx-tune", StepRate(None, None, 1 / 4.8, 15.9e9)),),
    ),
}


def open_shape(shape: PublishedShape, model: str | None, repeats: int, device: str) -> Opened:
    """Load the shape's model, or another, for its sizes.

    Raises: MemoryBudgetError if memory allows smaller sizes alone; the errors of `open_bench`.
    """
    request = BenchRequest((shape.completions,), shape.prompt_tokens, shape.tokens, repeats)
    opened = open_bench(model or shape.model, 0, request, device)
    if opened.left_out:
        raise MemoryBudgetError(
            f"This shape needs more memory than the limit allows ({', '.join(opened.left_out)}). "
            "Close other programs, or measure other sizes with --rows and --tokens."
        )
    return opened


def measure_steps(opened: Opened) -> StepRate:
    """Measure the sampling and the rest of whole steps, after a warm-up; medians of repeats."""
    with stepping(opened) as (scorer, log):
        groups: list[Group] = []

        def sample_group() -> None:
            groups[:] = sample(opened, opened.endless)

        def rest() -> None:
            finish(opened, groups, scorer, log)

        sample_group()
        rest()
        mx.reset_peak_memory()
        times = [(seconds(sample_group), seconds(rest)) for _ in range(opened.request.repeats)]
    tokens = sum(len(completion) for group in groups for completion in group.completions())
    return StepRate(
        rollout_tokens_per_s=tokens / median(sampling for sampling, _ in times),
        update_s=median(updating for _, updating in times),
        steps_per_s=1 / median(sampling + updating for sampling, updating in times),
        peak_bytes=mx.get_peak_memory(),
    )
