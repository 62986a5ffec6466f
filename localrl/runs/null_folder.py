"""The run folder of a rank that writes nothing, because only rank 0 does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localrl.records import MemoryPlan
from localrl.runs.logs import GroupRecord


class NullRunFolder:
    """Has the methods of a `RunFolder` that a run calls, and stores nothing."""

    path = Path()

    def write_config(self, text: str) -> None: ...
    def write_plan(self, plan: MemoryPlan) -> None: ...
    def metrics(self, record: Mapping[str, Any]) -> None: ...
    def event(self, kind: str, /, **fields: Any) -> None: ...
    def rollouts(self, step: int, records: Sequence[GroupRecord]) -> None: ...
    def sync(self) -> None: ...
    def sizes(self) -> dict[str, int]:
        return {}
