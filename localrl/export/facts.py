"""The publishable facts of a run, read from its folder by allow-lists only.

Nothing written by a person (prompts, answers, file names, paths, text settings) is included, nor
anything that identifies the machine.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.errors import ConfigError, DataError, LocalRLError
from localrl.rewards.catalog import parse_rewards
from localrl.runs.logs import read_jsonl
from localrl.tasks.builtin import list_tasks

SETTINGS = (
    "model.quantize",
    "model.chat_template",
    "lora.rank",
    "lora.scale",
    "lora.layers",
    "lora.keys",
    "task.train_prompts",
    "task.eval_prompts",
    "task.filter_overlong_prompts",
    "task.cut_reward",
    "task.eval_temperature",
    "task.reward_weights",
    "rollout.strategy",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.fork_rule",
    "rollout.stop_loops",
    "rollout.reuse",
    "rollout.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.temperature",
    "learning.lr",
    "learning.warmup_steps",
    "learning.lr_schedule",
    "learning.objective",
    "learning.prompt_weight",
    "learning.clip_low",
    "learning.clip_high",
    "learning.kl_coef",
    "learning.kl_estimator",
    "learning.kappa",
    "learning.mask_truncated",
    "learning.min_advantage",
    "learning.max_grad_norm",
    "learning.minibatches",
    "learning.updates_per_step",
    "run.steps",
    "run.minutes",
    "run.seed",
)
"""Settings that may be published: numbers, switches and names from our lists, never free text."""

SUPERVISED = (
    "rollout.prompts_per_step",
    "rollout.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.temperature",
    "learning.lr",
    "learning.warmup_steps",
    "learning.lr_schedule",
    "learning.kl_coef",
    "learning.kl_estimator",
    "learning.max_grad_norm",
    "learning.minibatches",
    "learning.updates_per_step",
)
"""Settings of `rollout` and `learning` that mean something where completions were given."""

PLAN = (
    "group_size",
    "decode_rows",
    "micro_rows",
    "head_chunk",
    "max_prompt_tokens",
    "max_completion_tokens",
    "grad_checkpoint",
    "dequantise",
    "threads",
    "predicted_bytes",
    "limit_bytes",
)

VERSIONS = (
    "localrl",
    "mlx",
    "mlx_lm",
    "numpy",
    "transformers",
    "huggingface_hub",
    "python",
    "device",
)

OWN_DATA = "own data"

WORD = re.compile(r"[\w.+-]{1,40}", re.ASCII)


@dataclass(frozen=True)
class HeldOutResult:
    """Results of the policy before or after training, on held-out prompts; None means unknown."""

    n: int | None
    pass_at_1: float | None
    ci95: tuple[float, float] | None
    mean_reward: float | None
    temperature: float
    """Sampling temperature; 0 means greedy decoding."""
    loss: float | None = None
    """Mean loss per token of held-out worked examples."""


@dataclass(frozen=True)
class Facts:
    """The publishable facts of a run."""

    task: str
    """Name of a built-in task; otherwise only a note that the data is the user's own."""
    about: str | None
    """Description of a built-in task."""
    rewards: tuple[str, ...]
    settings: Mapping[str, str]
    plan: Mapping[str, str]
    versions: Mapping[str, str]
    base: HeldOutResult | None
    adapter: HeldOutResult | None
    curve: tuple[float, ...]
    """Mean reward of each step that has a reward."""
    peak_bytes: int | None
    unsafe_code: bool
    embedded: bool
    """True if the model is the one that ships with localrl."""
    supervised: bool = False
    """True if the run learned from given completions."""


def read_facts(run: Path) -> Facts:
    """Read the facts of a run folder.

    Raises: ConfigError if it is not a run folder; DataError if one of its files cannot be read.
    """
    versions, config = _json(run / "run.json"), _toml(run / "config.toml")
    task, evaluation = config.get("task", {}), _json(run / "eval.json")
    metrics = list(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else []
    flat = {f"{section}.{key}": v for section, part in config.items() for key, v in part.items()}
    peaks = [_number(line.get("memory/peak_bytes")) for line in metrics]
    rewards = (_number(line.get("reward")) for line in metrics)
    supervised = "demonstrations" in task
    return Facts(
        **_task(str(task.get("name", ""))),
        rewards=_rewards(task.get("rewards", ())),
        settings=_shown(flat, [key for key in SETTINGS if not supervised or _is_used(key)]),
        plan=_shown(_json(run / "plan.json"), PLAN),
        versions=_shown(versions, VERSIONS),
        base=_side(evaluation.get("base")),
        adapter=_side(evaluation.get("adapter")),
        curve=tuple(reward for reward in rewards if reward is not None),
        peak_bytes=int(max((peak for peak in peaks if peak is not None), default=0)) or None,
        unsafe_code=task.get("unsafe_code") is True,
        embedded="path" not in config.get("model", {}),
        supervised=supervised,
    )


def _is_used(key: str) -> bool:
    """True if a setting means something in a supervised run."""
    return key in SUPERVISED or not key.startswith(("rollout.", "learning."))


def _task(name: str) -> dict[str, Any]:
    match = re.fullmatch(r"([a-z]+)(:[0-9-]+)?", name)
    about = list_tasks().get(match[1]) if match else None
    return {"task": name if about else OWN_DATA, "about": about}


def _rewards(texts: Sequence[str]) -> tuple[str, ...]:
    """Name the reward functions and whether they are built in, without paths or settings."""
    try:
        specs = parse_rewards([str(text) for text in texts])
    except LocalRLError:
        return ("own reward",)
    return tuple(
        f"`{spec.name}`, built into localrl"
        if spec.target.startswith("localrl.rewards.")
        else f"`{spec.name}`, own function"
        for spec in specs
    )


def _side(values: Any) -> HeldOutResult | None:
    if not isinstance(values, dict):
        return None
    ci95 = [_number(value) for value in values.get("ci95") or ()]
    low, high = ci95 if len(ci95) == 2 else (None, None)
    n, temperature = _number(values.get("n")), _number(values.get("temperature"))
    return HeldOutResult(
        n=None if n is None else int(n),
        pass_at_1=_number(values.get("pass@1")),
        ci95=None if low is None or high is None else (low, high),
        mean_reward=_number(values.get("mean_reward")),
        temperature=1.0 if temperature is None else temperature,  # older runs sampled at 1
        loss=_number(values.get("loss")),
    )


def _shown(values: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, str]:
    """Format the allowed entries that are a number, a switch, a word, or a list of these."""
    shown = {}
    for key in allowed:
        value = values.get(key)
        items = value if isinstance(value, list) else [value]
        if items and all(_is_plain(item) for item in items):
            shown[key] = ", ".join(map(_text, items))
    return shown


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return isinstance(value, bool | int | float)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file, unless it is the marker file.

    Raises: ConfigError if the marker is missing; DataError if the file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.name != "run.json":
            return {}
        raise ConfigError(
            f"{path.parent} is not a localrl run: it has no {path.name}. Pass a folder written by "
            "`localrl train`."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return value if isinstance(value, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
