"""Training in this process, with or without a supervisor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from localrl.cli.signals import stop_on_signals
from localrl.config import RunConfig
from localrl.display.console import Console
from localrl.errors import Stopped
from localrl.memory.failures import failure_of
from localrl.processes.child import OUT_OF_MEMORY, WATCHDOG, Supervisor
from localrl.processes.heartbeat import Heartbeat
from localrl.train import train
from localrl.training.session import Session


class SupervisedConsole(Console):
    """A console that also reports progress to the supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__()
        self._supervisor = supervisor

    def begin(self, session: Session) -> None:
        """Report the run folder, so that the supervisor can resume it."""
        self._supervisor.tell(run=str(session.folder))
        super().begin(session)

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """Report the completed step."""
        self._supervisor.tell(step=metrics["step"])
        super().stepped(metrics)


def run_here(
    config: RunConfig, supervisor: Supervisor | None, *, overwrite: bool, resume: bool
) -> None:
    """Train and show progress; exit with `OUT_OF_MEMORY` or `WATCHDOG` if a supervisor can recover
    from it."""
    console, heartbeat = Console(), Heartbeat()
    if supervisor is not None:
        console, heartbeat = SupervisedConsole(supervisor), Heartbeat(supervisor.beat)
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
    except Stopped as stopped:
        if console.began:
            raise
        raise Stopped(
            f"Stopped by {stopped} while the run was being opened. Nothing was computed; give the "
            "same command again."
        ) from None
    except (MemoryError, RuntimeError) as error:
        failure = failure_of(error)
        if supervisor is None or failure is None:
            raise
        if failure == "watchdog":
            console.warn(f"the GPU's watchdog ended work while a display is on: {error}")
            sys.exit(WATCHDOG)
        console.warn(f"out of memory, or GPU failure: {error}")
        sys.exit(OUT_OF_MEMORY)
    console.finish(result)
