"""localrl: teach a small language model a skill on your own machine.

    from localrl import RunConfig, train

    config = RunConfig.create({"run.steps": 20, "run.out": "runs/first"})
    result = train(config)
    print(result.base.pass_at_1, "->", result.adapter.pass_at_1)

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localrl.config import RunConfig
    from localrl.errors import LocalRLError
    from localrl.evaluate import Evaluation
    from localrl.records import (
        Batch,
        Completion,
        Example,
        Group,
        Leaf,
        MemoryPlan,
        Node,
        RewardSpec,
        ScoredGroup,
        StepStats,
    )
    from localrl.tasks.base import Task
    from localrl.train import RunResult, train

_HOMES = {
    "RunConfig": "config",
    "LocalRLError": "errors",
    "Evaluation": "evaluate",
    "Batch": "records",
    "Completion": "records",
    "Example": "records",
    "Group": "records",
    "Leaf": "records",
    "MemoryPlan": "records",
    "Node": "records",
    "ScoredGroup": "records",
    "StepStats": "records",
    "RewardSpec": "records",
    "Task": "tasks.base",
    "RunResult": "train",
    "train": "train",
}

__all__ = [
    "Batch",
    "Completion",
    "Evaluation",
    "Example",
    "Group",
    "Leaf",
    "LocalRLError",
    "MemoryPlan",
    "Node",
    "RewardSpec",
    "RunConfig",
    "RunResult",
    "ScoredGroup",
    "StepStats",
    "Task",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localrl' has no attribute {name!r}")
    return getattr(import_module(f"localrl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module localrl.train would otherwise put it in the function's place.
        if name == "train" and isinstance(value, ModuleType):
            value = value.train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
