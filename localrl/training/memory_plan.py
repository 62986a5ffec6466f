"""The memory request of a run, made from its settings alone, and the plan that answers it.

No weights are loaded: the model's sizes come from its config.json or the table of known shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from localrl import backend
from localrl.config import RunConfig
from localrl.embedded import EMBEDDED_MODEL
from localrl.engines.memory import engines_for
from localrl.errors import ConfigError
from localrl.gguf.reader import is_gguf
from localrl.memory.adapting import for_longer
from localrl.memory.calibration import key_of, recall
from localrl.memory.estimate import PRIORS, Coefficients, Estimate, Workload
from localrl.memory.known_models import find_known
from localrl.memory.limit import memory_limit
from localrl.memory.machine import Machine
from localrl.memory.plan import PlanRequest, PromptLength, changes, fit, initial_plan, refit
from localrl.memory.sizes import Sizes, parameters, quantised, read_sizes
from localrl.policy.folder import WEIGHTS, check_folder, read_object
from localrl.policy.loading import find_model
from localrl.records import MemoryPlan
from localrl.rollouts.groups import Shape, make_shape

NEAR = 0.5
"""Share of the limit above which a prediction is measured: priors are off by less than half."""


def sizes_of(folder: Path, quantize: int, dtype: str = "auto") -> Sizes:
    """Return the sizes of the model in a folder, as they will be after `--quantize`.

    dtype: `model.dtype`.

    Raises: ConfigError if its config.json is missing or does not describe a text model.
    """
    config = check_folder(folder)
    stored = sum(path.stat().st_size for path in folder.glob(WEIGHTS))
    return as_loaded(read_sizes(config, weight_bytes=stored), quantize, dtype)


def as_loaded(sizes: Sizes, quantize: int, dtype: str) -> Sizes:
    """Return the sizes after `--quantize` and `model.dtype`."""
    sizes = quantised(sizes, quantize)
    return replace(sizes, float_bytes=2) if dtype in ("fp16", "bf16") else sizes


def float_bytes(dtype: str, sizes: Sizes, *, on_cpu: bool) -> int:
    """Return the bytes of one number of an activation. dtype: `model.dtype`."""
    if dtype == "fp32" or (dtype == "auto" and on_cpu):
        return 4
    return sizes.float_bytes


def plan_request(
    config: RunConfig,
    sizes: Sizes,
    machine: Machine,
    *,
    prompts: PromptLength | None = None,
    trains: bool = True,
    turns: bool = False,
    held: int = 0,
) -> PlanRequest:
    """Return the memory request of a configuration on this machine.

    prompts: None assumes the longest allowed. turns: True if completions have several turns, also
    when only the task says so. held: bytes that MLX holds now: see `memory_limit`.

    Raises: ConfigError if `memory.limit` is impossible.
    """
    on_cpu = machine.device == "cpu" or config.model.on_cpu
    device = "cpu" if on_cpu else machine.device
    threads = backend.describe().threads if on_cpu else None
    engines = engines_for(config.model.engine, device=device)
    size = float_bytes(config.model.dtype, sizes, on_cpu=on_cpu)
    engine = next(e for e in engines if e.computes(sizes, size, dense=True))
    plan = initial_plan(
        config,
        vocabulary=sizes.vocabulary,
        on_cpu=on_cpu,
        threads=threads,
        prompt_tokens=prompts.tokens if prompts else None,
        kept=engine.kept_bytes(sizes),
    )
    groups = [plan.group_size, *range(plan.group_size - 1, 0, -1)]
    turns = turns or bool(config.task.environment or config.task.tools or config.task.agent)
    found = ((n, _workload(config, sizes, n, device, trains, turns)) for n in groups)
    workloads = {n: workload for n, workload in found if workload}
    limit = memory_limit(config.memory.limit, machine, held)
    return PlanRequest(plan, sizes, workloads, limit, prompts=prompts)


def shape_of(config: RunConfig, plan: MemoryPlan) -> Shape:
    """Return the shape of a prompt's completions under a plan."""
    return make_shape(replace(config.rollout, group_size=plan.group_size))


def make_plan(config: RunConfig, request: PlanRequest) -> MemoryPlan:
    """Make the plan before anything is loaded: pinned, or from priors and stored measurements.

    Measurements of earlier runs may raise row counts, but never the group size or the length:
    priors alone decide those, so that the next run of the same settings computes the same.

    Raises: MemoryBudgetError if nothing fits; ConfigError for a pin that cannot be read.
    """
    if config.memory.pin:
        return pinned(Path(config.memory.pin), config)
    plan = fit(request)
    known = _known_for(config, request, plan)
    return refit(request, plan, known) if known else plan


@dataclass(frozen=True)
class Outlook:
    """The results that `localrl plan` shows."""

    model: str
    weights: int
    """Number of weights."""
    machine: Machine
    request: PlanRequest
    plan: MemoryPlan
    estimate: Estimate

    @property
    def is_reduced(self) -> bool:
        """True if the plan gives less than the settings ask for."""
        return bool(changes(self.request.plan, self.plan))

    @property
    def enough(self) -> int:
        """The smallest `--memory-limit`, in bytes, under which nothing is given up."""
        return self.request.limit.setting(self.request.needed(self.request.plan))


def outlook(
    config: RunConfig,
    machine: Machine,
    prompts: PromptLength | None = None,
    sizes: Sizes | None = None,
) -> Outlook:
    """Return the plan for a machine, from the settings and the model's config.json alone.

    prompts: if None, the longest allowed prompts are assumed. sizes: those of the model, if they
    are known, so that it is not looked for.

    Raises: ConfigError if the model is not known; MemoryBudgetError if nothing fits.
    """
    name = config.model.path or EMBEDDED_MODEL
    sizes = sizes or _find_sizes(config)
    request = plan_request(config, sizes, machine, prompts=prompts)
    plan = make_plan(config, request)
    known = _known_for(config, request, plan) if plan.measured else None
    found = request.estimate(plan, known or PRIORS)
    return Outlook(name, parameters(sizes).total, machine, request, plan, found)


def _find_sizes(config: RunConfig) -> Sizes:
    """Return the sizes of a local model, of a config.json file, or of a well-known model."""
    name, quantize, dtype = config.model.path, config.model.quantize, config.model.dtype
    file = Path(name) if name else None
    if file is not None and file.is_file() and not is_gguf(file):
        found = read_object(file)
    else:
        try:
            folder = find_model(name)
            return sizes_of(folder, quantize, dtype)
        except ConfigError:
            found = find_known(name or "")
            if found is None:
                raise
    return as_loaded(read_sizes(found), quantize, dtype)


def worth_measuring(config: RunConfig, request: PlanRequest, plan: MemoryPlan) -> bool:
    """Return True if the plan is close enough to its limit for measured constants to matter."""
    if config.memory.pin or plan.limit_bytes is None or plan.predicted_bytes is None:
        return False
    if request.counted(plan):
        return False
    near = plan.predicted_bytes > NEAR * plan.limit_bytes
    return config.memory.recalibrate or (near and not plan.measured)


def with_engine(
    request: PlanRequest, plan: MemoryPlan, *, engine: str, fixed: bool
) -> tuple[PlanRequest, MemoryPlan]:
    """Return request and plan for the engine chosen. fixed: True to keep the plan as it is.

    Raises: MemoryBudgetError if the engine must be MLX, and not even the fewest rows fit.
    """
    workloads = {
        size: replace(workload, engines=tuple(e for e in workload.engines if e.name == engine))
        for size, workload in request.workloads.items()
    }
    found = replace(request, workloads=workloads)
    if fixed or request.limit.bytes is None:
        return found, plan
    expected = request.workloads[plan.group_size].engine(request.sizes, dense=plan.dequantise)
    if expected.name == engine:
        return found, plan
    return found, refit(found, plan, PRIORS)


def for_longer_prompts(
    config: RunConfig, request: PlanRequest, plan: MemoryPlan, tokens: int
) -> tuple[PlanRequest, MemoryPlan]:
    """Return request and plan for a prompt that is longer than the plan assumes."""
    known = _known_for(config, request, plan) if plan.measured else None
    return for_longer(request, plan, tokens, known or PRIORS)


def _known_for(config: RunConfig, request: PlanRequest, plan: MemoryPlan) -> Coefficients | None:
    """Return coefficients measured in earlier runs, unless they are to be measured again."""
    if config.memory.recalibrate or request.counted(plan):
        return None
    return recall(key_of(request.sizes, request.workloads[plan.group_size], plan))


def pinned(path: Path, config: RunConfig) -> MemoryPlan:
    """Return the plan stored in a file, unchanged.

    Raises: ConfigError if it is not a plan, or is for longer lengths than the configuration's.
    """
    try:
        plan = MemoryPlan(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"memory.pin is {str(path)!r}, which is not a plan ({error}). Name the plan.json of a "
            "run, or leave it out."
        ) from None
    for name in ("group_size", "max_prompt_tokens", "max_completion_tokens"):
        wish = getattr(config.rollout, "completions" if name == "group_size" else name)
        if getattr(plan, name) > wish:
            raise ConfigError(
                f"The plan in {path} has {name} {getattr(plan, name)}, more than rollout.{name}, "
                f"which is {wish}. Raise that, or pin another plan."
            )
    return plan


def _workload(
    config: RunConfig, sizes: Sizes, group_size: int, device: str, trains: bool, turns: bool
) -> Workload | None:
    """Return the workload of a group of this size; None if the strategy does not allow the size."""
    rollout, task, lora = config.rollout, config.task, config.lora
    least = 2 if rollout.strategy == "flat" else 1
    if group_size < min(least, rollout.completions):
        return None
    try:
        shape = make_shape(replace(rollout, group_size=group_size))
    except ConfigError:
        if group_size == rollout.completions:
            raise
        return None
    return Workload(
        prompts=rollout.prompts_per_step,
        evaluated=task.held_out,
        leaves=shape.leaves,
        forks=shape.leaves > shape.roots,
        turns=turns,
        rank=lora.rank,
        lora_layers=lora.layers,
        lora_keys=lora.keys,
        float_bytes=float_bytes(config.model.dtype, sizes, on_cpu=device == "cpu"),
        trains=trains,
        reference=trains and bool(lora.adapter and config.learning.kl_coef),
        engines=engines_for(config.model.engine, device=device),
        own_prompts=bool(task.agent),
    )
