"""The models that localrl knows, planned for one machine and ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localrl.config import RunConfig
from localrl.embedded import EMBEDDED_MODELS
from localrl.errors import ConfigError, MemoryBudgetError
from localrl.memory.known_models import CONVERTED, find_known, known_names
from localrl.memory.machine import Machine
from localrl.memory.sizes import parameters, read_sizes, weight_bytes
from localrl.policy.loading import find_model
from localrl.records import MemoryPlan
from localrl.training.memory_plan import as_loaded, outlook, sizes_of
from localrl.utils.packaged import PACKAGED_MODELS, find_packaged

Source = Literal["embedded", "here", "index", "Hub"]
"""Place of a model: inside localrl, on this machine, in the package index, or on the Hub."""
BITS = 4
"""Bits of the known models' weights, unless `model.quantize` says otherwise."""


@dataclass(frozen=True)
class Candidate:
    """A model, and the run that fits with it."""

    title: str
    """Name without its owner."""
    name: str
    """Name that `--model` takes."""
    quantize: int
    """Bits that `--quantize` has to give; 0 if it is stored so."""
    source: Source
    weights: int
    """Number of weights."""
    weight_bytes: int
    """Bytes of the weights as they are stored, quantised."""
    wished: tuple[int, int]
    """Group size and completion length of the settings."""
    plan: MemoryPlan | None
    """None if nothing fits."""
    problem: str = ""
    """Reason that nothing fits."""

    @property
    def reaches(self) -> bool:
        """True if the plan has the group size and the completion length of the settings."""
        plan = self.plan
        return plan is not None and (plan.group_size, plan.max_completion_tokens) == self.wished


def rank(settings: Mapping[str, Any], file: str | None, machine: Machine) -> list[Candidate]:
    """Plan the settings with every known model; the largest that reaches them comes first.

    Models with a smaller group or shorter completions follow, then those that do not fit. Models
    are taken at `BITS` bits, unless `model.quantize` is set.

    Raises: ConfigError if the settings are possible with no model.
    """
    bits = RunConfig.create({**settings, "model.path": EMBEDDED_MODELS[0]}, file).model.quantize
    found: list[Candidate] = []
    problems: list[ConfigError] = []
    for title, name, quantize, source in _places(bits or BITS):
        wish = {**settings, "model.path": name, "model.quantize": quantize}
        try:
            found.append(_planned(RunConfig.create(wish, file), machine, title, source))
        except ConfigError as error:  # such as lora.keys that its family lacks
            problems.append(error)
    if not found:
        raise problems[0]
    return sorted(found, key=lambda one: (one.plan is None, not one.reaches, -one.weights))


def _planned(config: RunConfig, machine: Machine, title: str, source: Source) -> Candidate:
    name, rollout = str(config.model.path), config.rollout
    loaded = config.model.quantize, config.model.dtype
    known = find_known(name) if name in PACKAGED_MODELS or source == "Hub" else None
    if known is None:
        sizes = sizes_of(find_model(name), *loaded)
    else:  # a packaged file need not be converted for this
        sizes = as_loaded(read_sizes(known), *loaded)
    plan, problem = None, ""
    try:
        plan = outlook(config, machine, sizes=sizes).plan
    except MemoryBudgetError as error:
        problem = str(error)
    return Candidate(
        title=title,
        name=name,
        quantize=config.model.quantize,
        source=source,
        weights=parameters(sizes).total,
        weight_bytes=weight_bytes(sizes, float32=False, dense=False),
        wished=(rollout.completions, rollout.max_completion_tokens),
        plan=plan,
        problem=problem,
    )


def _places(bits: int) -> Iterator[tuple[str, str, int, Source]]:
    """Yield title, name, `--quantize` and place of each model."""
    for name in EMBEDDED_MODELS:
        yield name, name, 0, "embedded"
    for name, model in PACKAGED_MODELS.items():
        yield name, name, 0, "here" if find_packaged(model) else "index"
    for name in known_names():
        title = name.rpartition("/")[2]
        converted = f"{CONVERTED}/{title}-{bits}bit"
        if _is_here(converted):
            yield title, converted, 0, "here"
        elif _is_here(name):
            yield title, name, bits, "here"
        else:
            yield title, converted, 0, "Hub"


def _is_here(name: str) -> bool:
    try:
        return find_model(name).is_dir()
    except ConfigError:
        return False
