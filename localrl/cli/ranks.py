"""Training as one of several ranks started by `mlx.launch`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from localrl.cli.signals import stop_on_signals
from localrl.config import RunConfig, keys
from localrl.display.console import Console
from localrl.distributed.collective import Ranks, join
from localrl.distributed.launch import LaunchInfo
from localrl.evaluate import Evaluation
from localrl.processes.heartbeat import Heartbeat
from localrl.train import train
from localrl.training.session import Session

PATIENCE_S = 15.0
"""Minimum gap before a second signal counts: when a rank ends, `mlx.launch` ends the others with
two signals in a row over ssh."""


class Follower:
    """Progress of a rank other than 0: prints only its own warnings."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def start(self, heartbeat: Heartbeat) -> None: ...
    def begin(self, session: Session) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None:
        print(f"rank {self._rank}: warning: {line}", file=sys.stderr, flush=True)

    def end(self) -> None: ...


class Leader(Console):
    """Console of rank 0; also lists the ranks."""

    def begin(self, session: Session) -> None:
        """Print the ranks, then the usual header."""
        ranks = session.ranks
        told = ", ".join(f"{rank} {name}" for rank, name in enumerate(ranks.names))
        self._write(f"ranks    {ranks.size}: {told} (experimental)")
        super().begin(session)


def run_with_others(
    place: LaunchInfo, resolve: Callable[[], RunConfig], *, overwrite: bool, resume: bool
) -> None:
    """Train together with the other ranks; the settings are those of rank 0."""
    with join(place) as (ranks, heartbeat), stop_on_signals(heartbeat, patience_s=PATIENCE_S):
        config = _of_first(ranks, resolve)
        console = Leader() if ranks.is_main else Follower(ranks.rank)
        result = train(
            config,
            overwrite=overwrite,
            resume=resume,
            progress=console,
            heartbeat=heartbeat,
            ranks=ranks,
        )
    if isinstance(console, Leader):
        console.finish(result)


def _of_first(ranks: Ranks, resolve: Callable[[], RunConfig]) -> RunConfig:
    """Broadcast rank 0's settings, because their files may exist only on its machine."""
    settings = {}
    if ranks.is_main:
        config = resolve()
        settings = {key: config.value(key) for key in keys() if config.value(key) is not None}
    return RunConfig.create(json.loads(ranks.broadcast(json.dumps(settings).encode())))
