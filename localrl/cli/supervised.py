"""Training in this process, beside a supervisor or alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from localrl.cli.console import Console
from localrl.cli.signals import stop_on_signals
from localrl.config import RunConfig
from localrl.memory.failures import failure_of
from localrl.processes.child import OUT_OF_MEMORY, Supervisor
from localrl.processes.heartbeat import Heartbeat
from localrl.train import train
from localrl.training.session import Session


class Told(Console):
    """Shows a run to a person, and tells its supervisor how far it is."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__()
        self._supervisor = supervisor

    def begin(self, session: Session) -> None:
        """Say where the run is, so that it can be gone on with."""
        self._supervisor.tell(run=str(session.folder))
        super().begin(session)

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """Say which step is done."""
        self._supervisor.tell(step=metrics["step"])
        super().stepped(metrics)


def run_here(
    config: RunConfig, supervisor: Supervisor | None, *, overwrite: bool, resume: bool
) -> None:
    """Train, and show it; ends the process with `OUT_OF_MEMORY` when a supervisor can mend that."""
    console, heartbeat = Console(), Heartbeat()
    if supervisor is not None:
        console, heartbeat = Told(supervisor), Heartbeat(supervisor.beat)
        supervisor.watch(heartbeat.stop)
    restart = supervisor.restart if supervisor else None
    try:
        with stop_on_signals(heartbeat):
            result = train(
                config,
                overwrite=overwrite,
                resume=resume,
                progress=console,
                heartbeat=heartbeat,
                restart=restart,
            )
    except (MemoryError, RuntimeError) as error:
        if supervisor is None or failure_of(error) is None:
            raise
        console.warn(f"out of memory, or the GPU failed: {error}")
        sys.exit(OUT_OF_MEMORY)
    console.finish(result)
