"""The arms of tokens_to_learn.py, and the models and tasks that they are compared on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A strategy: its settings over `BASE`, and what else makes it."""

    settings: Settings = field(default_factory=dict)
    rival: str | None = None
    """Name of its stage, see stages.py."""
    paper: str = ""
    """arXiv number of a strategy that is not localrl's own."""
    biased: bool = False
    """True if the expected gradient is not that of the sampled groups."""
    outside: bool = False
    """True if TRL runs it, in an environment of its own."""
    removed: bool = False
    """True if localrl does not have its settings any more; its results stay."""
    rate_of: str = ""
    """The arm whose learning rate it takes; empty: it is tuned itself."""


BASE: Settings = {
    "rollout.strategy": "flat",
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 8,
    "rollout.prompt_order": "shuffled",
    "rollout.replay_groups": 0,
    "rollout.reuse": 0.0,
    "learning.objective": "clipped",
    "learning.keep_completions": 0,
    "learning.min_advantage": 0.0,
    "learning.mask_truncated": False,
    "learning.kappa": 0.0,
    "learning.warmup_steps": 2,
    "learning.lr_schedule": "constant",
}
"""Said in full, so that arms stay what they are when defaults change or settings are removed."""


def shaped(prompts: int, completions: int, **settings: Any) -> Settings:
    """Settings of a step of so many prompts and completions each; `a__b` stands for "a.b"."""
    shape = {"rollout.prompts_per_step": prompts, "rollout.group_size": completions}
    return shape | {key.replace("__", "."): value for key, value in settings.items()}


TRACKER: Settings = {"learning__kappa": 4.0}
THOMPSON: Settings = {**TRACKER, "rollout__prompt_order": "thompson"}
ADAPTIVE: Settings = {"rollout__strategy": "adaptive"}
TREE: Settings = {**TRACKER, "rollout__strategy": "tree", "rollout__fork_rule": "periodic"}
FOREST: Settings = {**TREE, "rollout__strategy": "adaptive-tree"}
GRPO: Settings = {"learning__objective": "grpo"}
OURS = {
    "flat-8": Arm(),
    "flat-8 in large steps": Arm(shaped(16, 8)),
    "flat-8 in small steps": Arm(shaped(2, 8)),
    "flat-8 with tracker": Arm(shaped(2, 8, **TRACKER)),
    "pairs": Arm(shaped(8, 2, **TRACKER)),
    "pairs in larger steps": Arm(shaped(16, 2, **TRACKER)),
    "single": Arm(shaped(16, 1, **TRACKER)),
    "adaptive": Arm(shaped(4, 8, **TRACKER, **ADAPTIVE)),
    "tree by entropy": Arm(shaped(3, 8, **TREE | {"rollout__fork_rule": "entropy"})),
    "tree by period": Arm(shaped(3, 8, **TREE)),
    "pairs in mini-batches": Arm(
        shaped(16, 2, **TRACKER, learning__minibatches=2), rate_of="pairs"
    ),
    "pairs in four mini-batches": Arm(
        shaped(32, 2, **TRACKER, learning__minibatches=4), rate_of="pairs"
    ),
    "flat-8 in mini-batches": Arm(
        shaped(4, 8, learning__minibatches=2), rate_of="flat-8 in small steps"
    ),
    "flat-8 in four mini-batches": Arm(shaped(4, 8, learning__minibatches=4)),
    "pairs in smaller mini-batches": Arm(shaped(16, 2, **TRACKER, learning__minibatches=4)),
    "pairs + rounding": Arm(shaped(8, 2, **TRACKER, learning__min_advantage=0.5), rate_of="pairs"),
    "pairs + reuse": Arm(shaped(8, 2, **TRACKER, rollout__reuse=0.5)),
}
DAPO, GRESO, CPPO = "2503.14476", "2506.02177", "2503.22342"
RIVALS = {
    "GRPO-8": Arm(shaped(4, 8, **GRPO), paper="2402.03300"),
    "2-GRPO": Arm(shaped(16, 2, **GRPO), paper="2510.00977"),
    "2-GRPO in small steps": Arm(shaped(8, 2, **GRPO), paper="2510.00977"),
    "DAPO": Arm(shaped(4, 8, learning__objective="dapo"), "dynamic sampling", DAPO),
    "DAPO in small steps": Arm(shaped(2, 8, learning__objective="dapo"), "dynamic sampling", DAPO),
    "GRESO": Arm(shaped(4, 8, **GRPO), "skipping", GRESO),
    "GRESO in small steps": Arm(shaped(2, 8, **GRPO), "skipping", GRESO),
    "CPPO": Arm(shaped(4, 8, **GRPO), "pruning", CPPO, biased=True),
    "CPPO in small steps": Arm(shaped(2, 8, **GRPO), "pruning", CPPO, biased=True),
    "CPPO with allocation": Arm(shaped(16, 8, **GRPO), "pruning", CPPO, biased=True),
    "TRL": Arm(shaped(4, 8), paper="TRL's GRPOTrainer", outside=True, rate_of="flat-8"),
}
REMOVED = {
    "single + thompson": Arm(shaped(16, 1, **THOMPSON), removed=True),
    "adaptive + thompson": Arm(shaped(4, 8, **THOMPSON, **ADAPTIVE), removed=True),
    "adaptive-tree": Arm(shaped(3, 8, **FOREST), removed=True),
    "adaptive-tree + thompson": Arm(shaped(3, 8, **FOREST | THOMPSON), removed=True),
    "tracker + down-sampling": Arm(
        shaped(2, 8, **TRACKER, learning__keep_completions=4), removed=True
    ),
    "pairs + replay": Arm(shaped(8, 2, **TRACKER, rollout__replay_groups=4), removed=True),
    "pairs without prompt gradient": Arm(
        shaped(8, 2, **TRACKER, learning__prompt_grad=False),
        biased=True,
        removed=True,
        rate_of="pairs",
    ),
}
"""Strategies of version 0.1, and a tried one, that were no better than the same without them."""
PAIRS = shaped(8, 2, **TRACKER)
PREFIXES = "2605.05112"
STAGED = {
    "pairs + prefixes": Arm(PAIRS, "prefixes", PREFIXES, biased=True),
    "pairs + weighted prefixes": Arm(PAIRS, "weighted prefixes"),
    "pairs + allocation": Arm(PAIRS, "allocation"),
    "pairs + early end": Arm(PAIRS, "early end"),
    "pairs + early end + prefixes": Arm(PAIRS, "early end + prefixes", PREFIXES, biased=True),
    "flat-8 in small steps + early end": Arm(shaped(2, 8), "early end"),
}
"""Ideas written as stages."""
OPSD, SRPO, GKD = "2601.18734", "2604.02288", "2306.13649"
DISTILLED = {
    "distillation": Arm(shaped(8, 2), "distillation", OPSD, biased=True),
    "distillation to go": Arm(shaped(8, 2), "distillation to go", OPSD, biased=True),
    "distillation clipped": Arm(shaped(8, 2), "distillation clipped", OPSD, biased=True),
    "pairs + distillation": Arm(shaped(8, 2, **TRACKER), "distillation and reward", biased=True),
    "shown answer": Arm(
        shaped(4, 8, learning__minibatches=2),
        "shown answer",
        OPSD,
        biased=True,
        rate_of="flat-8 in small steps",
    ),
    "taught": Arm(
        shaped(16, 2, learning__minibatches=4),
        "taught",
        GKD,
        biased=True,
        rate_of="flat-8 in small steps",
    ),
    "flat-8 in mini-batches + distillation": Arm(
        shaped(4, 8, learning__minibatches=2),
        "distillation and reward",
        biased=True,
        rate_of="flat-8 in small steps",
    ),
    "pairs + distilled failures": Arm(
        shaped(8, 2, **TRACKER), "distillation of failures", SRPO, biased=True
    ),
}
"""Towards the model that knows the answer, so their gradient is not that of a reward. They need a
model that can read a hint, which the embedded one cannot."""
ANSWERS = "the answers of the training prompts"
"""Stands for a file of them as worked examples, which a run writes."""
GIVEN = {
    "worked examples": Arm(
        shaped(8, 1, learning__kappa=None, task__demonstrations=ANSWERS),
        rate_of="flat-8 in small steps",
    ),
}
"""Nothing is generated: the tokens are those learned, as `localrl sft` learns them."""
LISTED = {
    "options": Arm(shaped(8, 2), "options", biased=True),
    "options in text": Arm(shaped(8, 2), "options in text"),
    "options in log text": Arm(shaped(8, 2), "options in log text", biased=True),
}
"""For tasks with a column `options`."""
ARMS = OURS | REMOVED | RIVALS | STAGED | DISTILLED | GIVEN | LISTED
"""Names without commas: options separate them so."""
BASES = ("flat-8", "flat-8 in small steps")
"""What arms are compared with; the second says what is not merely the size of the steps."""


def base_of(arms: Iterable[str]) -> str:
    """Return the first of `BASES` that is among these arms; empty if none is."""
    return next((base for base in BASES if base in set(arms)), "")


@dataclass(frozen=True)
class Goal:
    """A task and what to reach on its held-out prompts."""

    settings: Settings
    goal: float
    stop: float
    """A run ends when two evaluations in a row are above this."""
    measure: str = "pass@1"
    """What is to reach the goal; or mean_reward, where few completions are right as a whole."""


@dataclass(frozen=True)
class Subject:
    """A model, its tasks, and the sizes of its runs."""

    name: str
    settings: Settings
    tasks: dict[str, Goal]
    """The first one decides the learning rates."""
    arms: tuple[str, ...]
    """Those that run unless others are named."""
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    budget: int
    """Most tokens that a run generates."""
    every: int
    """Generated tokens between evaluations."""
    prompts: int
    """Held-out prompts of an evaluation."""
    seconds: str
    """Field of an evaluation that holds the compared seconds: wall_s, or cpu_s for one thread."""
    at_once: int = 1
    """Runs at the same time."""


STRICT = {"task.rewards": ["examples/smollm2/rewards.py:facts"]}
"""The reward of examples/smollm2: an object and nothing else, with the share of its facts that are
right; on the base model pass@1 is 0.18 with it (levels 1 to 3), and 0.58 with the built-in reward,
which is 0 or 1 and takes the last object in a text (level 2). Paths are the repository's."""
EMBEDDED = Subject(
    name="embedded",
    settings={"task.train_prompts": 64, "memory.threads": 1},
    tasks={
        "steps": Goal({"task.name": "steps"}, 0.85, 0.9),
        "sorting": Goal({"task.name": "sorting"}, 0.85, 0.9),
    },
    arms=tuple(name for name, arm in (OURS | RIVALS).items() if not arm.outside),
    rates=(1.2e-3, 2.4e-3, 4.8e-3),
    tuning_seeds=(100, 101),
    budget=40_000,
    every=2_000,
    prompts=128,
    seconds="cpu_s",
    at_once=2,
)
SMOLLM2 = Subject(
    name="smollm2",
    settings={
        "model.path": "smollm2-135m",
        "task.train_prompts": 64,
        "rollout.temperature": 0.7,
        "rollout.max_completion_tokens": 64,
        "memory.threads": 1,
    },
    tasks={
        "facts": Goal({"task.name": "extraction:1-3", **STRICT}, 0.5, 0.5),
        "three facts": Goal({"task.name": "extraction:2"}, 0.75, 0.75),
    },
    arms=(
        *("flat-8", "flat-8 in small steps", "flat-8 in mini-batches", "pairs in mini-batches"),
        *("pairs in larger steps", "2-GRPO in small steps", "CPPO in small steps"),
        *("shown answer", "taught", *GIVEN),
    ),
    rates=(3e-4, 6e-4, 1.2e-3),
    tuning_seeds=(100,),
    budget=16_000,
    every=2_000,
    prompts=64,
    seconds="cpu_s",
    at_once=2,
)
"""A run takes about five minutes of processor time."""
LONG = Subject(
    name="smollm2-long",
    settings=SMOLLM2.settings | {"rollout.max_completion_tokens": 128},
    tasks={
        "ten facts": Goal(
            {"task.name": "benchmarks/ten_facts.py", **STRICT}, 0.7, 0.7, "mean_reward"
        ),
    },
    arms=("flat-8 in small steps", "tree by entropy", "tree by period"),
    rates=(3e-4,),
    tuning_seeds=(),
    budget=18_000,
    every=3_000,
    prompts=32,
    seconds="cpu_s",
    at_once=2,
)
"""Where branching should pay if anywhere: completions of about 80 tokens with partial credit; the
base model's mean reward is 0.26 to 0.34. All arms have one learning rate: of six runs at higher
ones, which a first seed preferred (period 1.2e-3, the others 6e-4), three did not get there."""
CHOICES = Subject(
    name="choices",
    settings={"memory.threads": 1, "rollout.max_completion_tokens": 1},
    tasks={
        "first letter": Goal(
            {
                "task.name": "benchmarks/first_letter",
                "task.rewards": ["accuracy"],
            },
            0.85,
            0.9,
        )
    },
    arms=("flat-8", "flat-8 in small steps", "pairs", *LISTED),
    rates=(1.2e-3, 2.4e-3, 4.8e-3),
    tuning_seeds=(100, 101),
    budget=8_000,
    every=200,
    prompts=128,
    seconds="cpu_s",
    at_once=2,
)
"""The embedded model names the first of five letters where it would have guessed."""
SUBJECTS = {subject.name: subject for subject in (EMBEDDED, SMOLLM2, LONG, CHOICES)}
