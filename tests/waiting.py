"""How tests wait for what another process or thread does: as long as a busy machine may need.

What must be quick is counted. A deadline is there for what never comes, and says nothing of speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE_S = 300.0
"""Seconds until it is thought that something never comes."""
FOREVER_S = 3 * DEADLINE_S
"""How long something goes on that a test must see ended by somebody else."""


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Return once the condition holds; it fails after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)
