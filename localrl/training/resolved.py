"""Settings that were resolved: what they name is found and read, and checked to work together.

From them come the memory request of this machine, the loaded model, and its policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localrl import backend
from localrl.backend import mx, tree_flatten
from localrl.config import RunConfig
from localrl.engines.floats import Prompts
from localrl.engines.open import make_policy
from localrl.errors import ConfigError
from localrl.export.adapters import Adapter
from localrl.export.base import find_base_id
from localrl.export.starting import starting_adapter
from localrl.memory.machine import read_machine
from localrl.memory.plan import PlanRequest, PromptLength, cache_bytes
from localrl.memory.sizes import Sizes
from localrl.policy.loading import find_model
from localrl.policy.model import LoadedModel, Policy, load_model, read_shape
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.records import MemoryPlan, RewardSpec
from localrl.rewards.catalog import parse_rewards
from localrl.rewards.code import allow_unsafe_code
from localrl.rollouts.groups import Shape, make_shape
from localrl.training.memory_plan import (
    plan_request,
    sizes_of,
)
from localrl.training.supervised_settings import as_supervised


@dataclass(frozen=True, eq=False)
class ResolvedConfig:
    """Settings that were read and checked for compatibility before anything is loaded."""

    config: RunConfig
    """The settings, with rank, scale and layers of the starting adapter and all derived values."""
    rewards: Sequence[RewardSpec]
    shape: Shape
    model_folder: Path
    sizes: Sizes
    adapter: Adapter | None
    """The adapter to start from."""


def resolve(config: RunConfig, *, starts: bool = True) -> ResolvedConfig:
    """Read everything that the settings name, except the model's weights and the task.

    starts: False if a checkpoint replaces the adapter to start from, which is then not read.

    Raises: ConfigError for settings that cannot work; CheckpointError for a damaged adapter.
    """
    if config.model.engine == "cpu" and config.model.dtype in ("fp16", "bf16"):
        raise ConfigError(
            f"model.engine is cpu, which computes float32 only, but model.dtype is "
            f"{config.model.dtype}. Set model.dtype to auto, or model.engine to mlx."
        )
    backend.compute_on_cpu(config.model.on_cpu)
    if config.supervised:
        config = as_supervised(config)
    rewards = parse_rewards(
        config.task.rewards, config.task.reward_weights or None, config.task.reward_settings
    )
    shape = make_shape(config.rollout)
    model_folder = find_model(config.model.path)
    shape_of_model, adapter = read_shape(model_folder), None
    if starts:
        config, adapter = starting_adapter(config, shape_of_model.layers)
    # Written to config.toml, to tell it apart from an older run that has no such setting.
    config = config.replace("task.eval_temperature", config.eval_temperature)
    find_base_id(config.model.base_id, model_folder, config.model.path)
    allow_unsafe_code(config.task.unsafe_code)
    sizes = sizes_of(model_folder, config.model.quantize, config.model.dtype)
    return ResolvedConfig(config, rewards, shape, model_folder, sizes, adapter)


def load(resolved: ResolvedConfig, tokenizer: Tokenizer | None = None) -> LoadedModel:
    """Load the model without adapters. tokenizer: its tokenizer, if already read.

    Raises: ConfigError if the model cannot be read.
    """
    wish = resolved.config.model
    mx.reset_peak_memory()  # the peak of an earlier run in this process does not count
    return load_model(
        resolved.model_folder,
        quantize=wish.quantize,
        tokenizer=tokenizer or load_tokenizer(resolved.model_folder, wish),
    )


def local_plan_request(
    resolved: ResolvedConfig,
    *,
    prompts: PromptLength | None = None,
    trains: bool,
    turns: bool = False,
) -> PlanRequest:
    """Return the memory request of these settings on this machine.

    Raises: ConfigError if `memory.limit` is impossible.
    """
    if threads := resolved.config.memory.threads:
        backend.set_threads(threads)
    held = mx.get_active_memory() + mx.get_cache_memory()
    machine = read_machine()
    return plan_request(
        resolved.config,
        resolved.sizes,
        machine,
        prompts=prompts,
        trains=trains,
        turns=turns,
        held=held,
    )


def open_policy(
    resolved: ResolvedConfig, loaded: LoadedModel, plan: MemoryPlan, prompts: Prompts = ()
) -> Policy:
    """Return the model with its adapters, with the plan's limits applied.

    prompts: tokens of a few prompts, for choosing the model's floats.
    """
    if plan.threads:
        backend.set_threads(plan.threads)
    if plan.limit_bytes is not None:
        on_cpu = backend.describe().device == "cpu"
        mx.set_cache_limit(cache_bytes(plan.limit_bytes, on_cpu=on_cpu))
        # Above it MLX waits for running work before it allocates more, and frees its buffers.
        mx.set_memory_limit(plan.limit_bytes)
    return _policy(resolved.config, loaded, plan, resolved.adapter, prompts)


def _policy(
    config: RunConfig,
    loaded: LoadedModel,
    plan: MemoryPlan,
    start: Adapter | None,
    prompts: Prompts,
) -> Policy:
    policy = make_policy(
        loaded,
        rank=config.lora.rank,
        scale=config.lora.scale,
        seed=config.run.seed,
        for_cpu=backend.describe().device == "cpu",
        dense=plan.dequantise,
        layers=config.lora.layers,
        keys=config.lora.keys,
        weights=start.weights if start else None,
        source=config.lora.adapter,
        dtype=config.model.dtype,
        prompts=prompts,
    )
    if start is None or not config.learning.kl_coef:
        return policy
    given: Any = tree_flatten(policy.model.trainable_parameters())
    return replace(policy, reference=dict(given))
