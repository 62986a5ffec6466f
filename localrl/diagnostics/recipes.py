"""Published comparisons that `localrl bench --recipe` runs here with localrl's strategies.

Each is data: a model, problems, settings, and the figures that others published. None has been run
on a Mac by localrl's authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
"""Settings of a run by name, `section.field`."""


@dataclass(frozen=True)
class PublishedRun:
    """A line of a published table."""

    method: str
    accuracy: float
    """Share of right answers to the held-out problems."""
    seconds: float | None = None
    """Seconds of training; None for the model as it was before."""


@dataclass(frozen=True)
class Recipe:
    """A published comparison, and the strategies to compare here."""

    model: str
    data: str
    """The task's name: a data set on the Hub."""
    problems: int
    """Number of training problems; every arm sees each of them once."""
    held_out: int
    settings: Settings
    """Settings of all arms."""
    arms: Mapping[str, Settings]
    """Further settings of each strategy by its name; all have `rollout.prompts_per_step` and
    `rollout.group_size`."""
    published: tuple[PublishedRun, ...]
    source: str
    """Publication of the figures, and the machine that they were measured on."""
    differences: str
    """Other differences from the published runs."""


THINK_AND_ANSWER = (
    "Reason first, between <think> and </think>. Then write the answer, on a line of its own "
    "between <answer> and </answer>."
)

FORMAT = 'regex(pattern="<think>.*</think>\\n<answer>.*</answer>")'

RECIPES: Mapping[str, Recipe] = {
    "gsm8k-cppo": Recipe(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        data="openai/gsm8k:main",
        problems=7473,
        held_out=1319,
        settings={
            "task.rewards": [
                "accuracy",
                'regex(pattern="<think>.*</think>\\n<answer>.*</answer>")',
            ],
            "task.system": THINK_AND_ANSWER,
            "task.eval_temperature": 0,
            "rollout.temperature": 1.0,
            "rollout.max_prompt_tokens": 512,
            "rollout.max_completion_tokens": 1024,
        },
        arms={
            "GRPO-16": {
                "rollout.prompts_per_step": 1,
                "rollout.group_size": 16,
                "learning.objective": "grpo",
                "learning.kl_coef": 0.04,
                "learning.updates_per_step": 2,
            },
            "pairs": {
                "rollout.prompts_per_step": 8,
                "rollout.group_size": 2,
                "learning.kappa": 4.0,
            },
        },
        published=(
            PublishedRun("the model before", 0.5572),
            PublishedRun("GRPO-16", 0.7705, 23_393),
            PublishedRun("CPPO, trains 8 of 16", 0.7767, 12_930),
            PublishedRun("CPPO, trains 4 of 16", 0.7881, 7_159),
            PublishedRun("CPPO, trains 2 of 16", 0.8041, 4_781),
            PublishedRun("CPPO, trains 1 of 16", 0.7820, 2_813),
        ),
        source="arXiv 2503.22342v1, table 1, measured by its authors on two GPUs of 80 GB",
        differences="they trained all weights at a learning rate of 1e-6 that falls with a cosine, "
        "and CPPO samples more problems in place of what it leaves out; here adapters are trained, "
        "at localrl's learning rate, with a system message in other words. CPPO is not run here",
    ),
}
