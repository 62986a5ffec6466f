"""Training as one of several ranks, which `mlx.launch` has started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from localrl.cli.console import Console
from localrl.cli.signals import stop_on_signals
from localrl.config import RunConfig, keys
from localrl.distributed.collective import Ranks, join
from localrl.distributed.launch import LaunchInfo
from localrl.evaluate import Evaluation
from localrl.train import train
from localrl.training.session import Session

PATIENCE_S = 15.0
"""`mlx.launch` ends the others when a rank has ended, with two signals in a row over ssh."""


class Follower:
    """A rank that leaves the showing to rank 0, but for its own warnings."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def begin(self, session: Session) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None:
        print(f"rank {self._rank}: warning: {line}", file=sys.stderr, flush=True)


class Leader(Console):
    """Shows the run, and who takes part in it."""

    def begin(self, session: Session) -> None:
        """Name the ranks too."""
        ranks = session.ranks
        told = ", ".join(f"{rank} {name}" for rank, name in enumerate(ranks.names))
        self._line(f"ranks    {ranks.size}: {told} (experimental)")
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
    """Rank 0's settings: the files that they come from may be on its machine alone."""
    settings = {}
    if ranks.is_main:
        config = resolve()
        settings = {key: config.value(key) for key in keys() if config.value(key) is not None}
    return RunConfig.create(json.loads(ranks.broadcast(json.dumps(settings).encode())))
