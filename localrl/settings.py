"""The settings: default, unit, range and help of each, by section."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

OBJECTIVES = ("clipped", "grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo", "rloo")
"""Objectives defined in `localrl.learning.objectives`."""

PROMPT_WEIGHTS = ("none", "mean", "std", "maxrl")
"""Prompt weights defined in `localrl.learning.weighting`."""

STRATEGIES = ("flat", "tree", "adaptive")
FORK_RULES = ("periodic", "entropy")
THINKING = ("auto", "on", "off")
DEVICES = ("auto", "cpu")
ENGINES = ("auto", "mlx", "cpu")
DTYPES = ("auto", "fp16", "bf16", "fp32")
SELFCHECKS = ("strict", "warn")
LR_SCHEDULES = ("constant", "linear", "cosine")
"""Schedules defined in `localrl.learning.schedule`."""
KL_ESTIMATORS = ("k1", "k2", "k3")
"""KL estimators defined in `localrl.learning.objective`."""

DATE = r"\d{4}-\d\d-\d\d"
LIMIT_FORM = r"(?i)\s*(\d+(?:\.\d+)?)\s*(MB|MiB|GB|GiB|%)\s*"
"""Pattern of a size or a share, as `localrl.memory.limit` reads it."""


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    form: str | None = None,
    or_zero: bool = False,
) -> Any:
    """Declare a field of a section: its default, one line of help, and its allowed values.

    or_zero: 0 is allowed too, although it is below `low`.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "form": form}
    metadata["or_zero"] = or_zero
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    path: str | None = setting(None, "model folder, GGUF file, or user/name; unset: embedded")
    quantize: int = setting(0, "quantise to 4 or 8 bits when loading; 0: as stored")
    thinking: str = setting("auto", "thinking mode of models that have one", choices=THINKING)
    chat_template: str = setting(
        "auto", "off: prompts are texts given to the model as they are", choices=("auto", "off")
    )
    template_date: str | None = setting(
        None, "the date that chat templates see, YYYY-MM-DD; unset: the run's first day", form=DATE
    )
    end_tokens: tuple[str, ...] = setting((), "more tokens that end a turn, e.g. <|im_end|>")
    device: str = setting(
        "auto", "MLX's own choice (Metal on a Mac), or the CPU of any machine", choices=DEVICES
    )
    engine: str = setting(
        "auto",
        "compute with MLX, or with NumPy and C (cpu); auto: cpu where possible",
        choices=ENGINES,
    )
    dtype: str = setting(
        "auto",
        "floats; auto: fp32 on a CPU; on a GPU as stored, bf16 as fp16 if it is in range",
        choices=DTYPES,
    )
    selfcheck: str = setting(
        "strict", "a failed self-check ends the run, or is a warning (warn)", choices=SELFCHECKS
    )
    base_id: str | None = setting(None, "Hub id of the unquantised model; unset: from its card")

    @property
    def on_cpu(self) -> bool:
        """True if no GPU may be used, whether there is one or not."""
        return self.device == "cpu" or self.engine == "cpu"


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA adapters."""

    rank: int = setting(16, "rank of the adapters", low=1, high=1024)
    scale: float = setting(2.0, "factor on the adapter's output (alpha / rank)", low=0.0)
    layers: int = setting(0, "number of last blocks to adapt; 0: all", low=0)
    keys: tuple[str, ...] = setting(
        (), "layers in a block, e.g. self_attn.q_proj; unset: all linear"
    )
    adapter: str | None = setting(None, "adapter folder to start from; it sets all of the above")


@dataclass(frozen=True)
class TaskConfig:
    """The task, its rewards and its prompts."""

    name: str = setting("steps", "built-in task, or your data: a table, folder or user/name")
    demonstrations: str | None = setting(
        None, "worked examples to learn from, for `localrl sft`: a table, or a run's successes"
    )
    columns: tuple[str, ...] = setting(
        (), "columns of your data under other names, e.g. prompt=question"
    )
    rewards: tuple[str, ...] = setting((), "rewards, as file.py:name; unset: the task's own")
    reward_weights: tuple[float, ...] = setting((), "one weight per reward; unset: all 1")
    decided: str | None = setting(
        None, "function that tells when an outcome is decided, to end there, as file.py:name"
    )
    system: str | None = setting(None, "system message for data without one")
    filter_overlong_prompts: bool = setting(
        False, "leave out rows with prompts above rollout.max_prompt_tokens, and say how many"
    )
    environment: str | None = setting(
        None, "environment to interact with, as file.py:Name; unset: the task's own"
    )
    tools: tuple[str, ...] = setting((), "functions the model may call, as file.py:name")
    agent: str | None = setting(
        None, "your agent, as file.py:function: it calls the model by OpenAI's API"
    )
    agent_timeout_s: float = setting(
        60.0, "seconds that an agent may work between two calls of the model", low=0.01
    )
    tool_timeout_s: float = setting(
        5.0, "seconds allowed per environment reply or tool call", low=0.01
    )
    train_prompts: int = setting(0, "prompts in the training set; 0: all, or endless", low=0)
    eval_prompts: int | None = setting(
        None,
        "held-out prompts per evaluation; 0: none held out; unset: 256, fewer on a slow machine",
        low=0,
    )
    eval_temperature: float | None = setting(
        None,
        "evaluation temperature; 0: greedy; unset: rollout.temperature",
        low=0.01,
        high=100.0,
        or_zero=True,
    )
    cut_reward: float | None = setting(
        None, "reward of completions cut off for length or looping; unset: as scored"
    )
    unsafe_code: bool = setting(False, "run generated code without a sandbox: it can do anything")
    judge_url: str | None = setting(
        None, "server of the rewards judge and judge_rank; unset: Ollama or LM Studio, here"
    )
    judge_model: str | None = setting(None, "model to ask there; unset: its only one")
    judge_prompt: str | None = setting(
        None, "question to the judge, as text with {completion}, or a file; unset: a general one"
    )
    judge_scale: str = setting("0-10", "scores of judge, or choices with rewards: yes=1, no=0")
    judge_parallel: int = setting(4, "requests to the judge at a time", low=1, high=256)
    judge_timeout_s: float = setting(
        120.0, "seconds allowed per request to the judge", low=0.01, high=600.0
    )
    judge_max_tokens: int = setting(1024, "longest reply of the judge, in tokens", low=1)
    reward_timeout_s: float = setting(30.0, "seconds allowed per reward call", low=0.01)
    reward_memory_mb: int = setting(2048, "reward process memory limit, in megabytes", low=16)

    @property
    def held_out(self) -> int:
        """Maximum number of held-out prompts per evaluation."""
        return 256 if self.eval_prompts is None else self.eval_prompts

    @property
    def reward_settings(self) -> dict[str, dict[str, Any]]:
        """The settings judge_* that are not the default ones, by reward and without the prefix."""
        prefix = "judge_"
        changed = {
            spec.name.removeprefix(prefix): getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if spec.name.startswith(prefix) and getattr(self, spec.name) != spec.default
        }
        ranks = {name: value for name, value in changed.items() if name != "scale"}
        return {"judge": changed, "judge_rank": ranks}


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    prompts_per_step: int = setting(16, "distinct prompts per step", low=1)
    group_size: int = setting(0, "maximum completions per prompt; 0: 2 if flat, else 8", low=0)
    strategy: str = setting("flat", "independent completions, trees, rounds", choices=STRATEGIES)
    fork_rule: str = setting(
        "periodic", "where trees fork: at random places or at uncertain tokens", choices=FORK_RULES
    )
    stop_loops: bool = setting(
        False, "end a completion that repeats itself; its repetition is not trained: a bias"
    )
    stop_text: tuple[str, ...] = setting((), "end a completion after these texts, e.g. </answer>")
    reuse: float = setting(
        0.0, "share of completions that continue a prefix of an earlier one", low=0.0, high=1.0
    )
    max_prompt_tokens: int = setting(
        512, "a longer prompt is an error, see task.filter_overlong_prompts", low=1
    )
    max_completion_tokens: int = setting(256, "a longer completion is cut off", low=1)
    max_turns: int = setting(8, "maximum model turns per completion, with environments", low=1)
    temperature: float = setting(1.0, "temperature of sampling and scoring", low=0.01, high=100.0)

    @property
    def completions(self) -> int:
        """Number of completions per prompt: `group_size`, or the strategy's default, see
        docs/strategies.md."""
        return self.group_size or (2 if self.strategy == "flat" else 8)


@dataclass(frozen=True)
class LearningConfig:
    """The objective and the optimizer (Adam)."""

    lr: float = setting(5e-5, "learning rate after warm-up", low=0.0)
    warmup_steps: int = setting(5, "updates over which the learning rate rises", low=0)
    lr_schedule: str = setting(
        "constant",
        "learning rate after warm-up; linear, cosine: falls to 0 at run.steps",
        choices=LR_SCHEDULES,
    )
    objective: str = setting("clipped", "loss function, see docs/papers.md", choices=OBJECTIVES)
    prompt_weight: str | None = setting(
        None, "weighting of prompts; unset: as in the objective's paper", choices=PROMPT_WEIGHTS
    )
    clip_low: float | None = setting(
        None, "clip the ratio at 1 - this; unset: as in the paper", low=0.0, high=1.0
    )
    clip_high: float | None = setting(
        None, "clip the ratio at 1 + this; unset: as in the paper", low=0.0
    )
    kl_coef: float = setting(
        0.0,
        "weight of the KL to the adapter given, or the base without one; 0: not computed",
        low=0.0,
    )
    kl_estimator: str = setting("k3", "KL estimator", choices=KL_ESTIMATORS)
    kappa: float | None = setting(
        None,
        "weight of the tracker in baselines; unset: 0 in flat groups above 2, else 4",
        low=0.0,
    )
    mask_truncated: bool = setting(
        False, "leave completions cut off for length out of the update: they teach nothing, a bias"
    )
    min_advantage: float = setting(0.0, "round smaller advantages at random to this or 0", low=0.0)
    max_grad_norm: float = setting(1.0, "clip the gradient to this global norm", low=0.0)
    minibatches: int = setting(
        1, "parts of a step's prompts, each with an optimizer update of its own", low=1
    )
    updates_per_step: int = setting(1, "updates on each of these parts", low=1)


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes that trade memory for speed; none of them changes the result."""

    decode_rows: int = setting(0, "sequences decoded at once; 0: the whole step", low=0)
    micro_rows: int = setting(0, "sequences in one backward pass; 0: chosen", low=0)
    head_chunk: int = setting(0, "positions whose logits are held at once; 0: chosen", low=0)
    dequantise: str = setting("auto", "base as float32 on CPU", choices=("auto", "on", "off"))
    threads: int = setting(0, "CPU threads for matrix products; 0: chosen", low=0)
    limit: str | None = setting(
        None, "limit of the process: 6GB, or 70% of the machine's; unset: chosen", form=LIMIT_FORM
    )
    pin: str | None = setting(None, "plan.json to use unchanged")
    recalibrate: bool = setting(False, "measure memory again, then choose sizes")


@dataclass(frozen=True)
class RunSection:
    """Length, seed and folder of the run."""

    steps: int = setting(100, "training steps", low=0)
    minutes: float | None = setting(None, "stop after this many minutes of training", low=0.0)
    seed: int = setting(0, "seed of all random draws", low=0)
    eval_every: int = setting(0, "also evaluate every N steps; 0: only before and after", low=0)
    out: str | None = setting(None, "run folder; unset: a new one under runs/")
    checkpoint_every: int = setting(
        0, "steps between checkpoints; 0: as often as 1 % of the time allows", low=0
    )
    keep_every: int = setting(
        0, "also keep the checkpoint of every Nth step; 0: the last two and the best", low=0
    )
    report_to: tuple[str, ...] = setting((), "also log to tensorboard or wandb; unset: neither")
    rollout_log_limit: int = setting(
        200_000_000, "size of rollouts.jsonl in bytes beyond which 1 group in 10 is written", low=0
    )
