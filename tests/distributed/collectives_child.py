"""What each rank of `test_collective.py` does."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
from waiting import DEADLINE_S

from localrl.distributed import collective
from localrl.distributed.collective import join
from localrl.distributed.launch import find_place
from localrl.distributed.liveness import LivenessTimeouts
from localrl.errors import Stopped

place = find_place()
assert place is not None
how = sys.argv[1]
# Of a rank that dies or fails the others are told; only one that sleeps is found silent.
silence = 5.0 if how == "sleep" else DEADLINE_S
if how == "early":  # one is killed when they have met, and MLX has not
    made = collective._group
    dies = place.rank == place.size - 1
    collective._group = lambda place, _: (
        os.kill(os.getpid(), signal.SIGKILL) if dies else made(place, 2.0)
    )
try:
    with join(place, LivenessTimeouts(silence=silence, grace=2.0)) as (ranks, heartbeat):
        rank = ranks.rank
        told = ranks.gather(bytes([rank]) * (rank * 1000))
        assert told == [bytes([r]) * (r * 1000) for r in range(ranks.size)]
        assert ranks.gather(b"") == [b""] * ranks.size
        assert ranks.broadcast(f"from {rank}".encode()) == b"from 0"
        assert ranks.broadcast(b"") == b""
        numbers = np.arange(5, dtype=np.float32) * (rank + 1)
        factor = sum(range(1, ranks.size + 1))
        assert (ranks.sum(numbers) == np.arange(5) * factor).all()
        items = list(range(7))
        assert ranks.unshard([items[r :: ranks.size] for r in range(ranks.size)]) == items
        assert ranks.shard(items) == items[rank :: ranks.size]
        assert ranks.waited_s > 0
        assert len(ranks.names) == ranks.size
        if rank == ranks.size - 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == ranks.size - 1 and how == "sleep":
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == ranks.size - 1 and how == "raise":
            raise ValueError("something of this rank's own")
        if rank == 0 and how == "busy":  # elsewhere than in a collective
            time.sleep(0.5)
        ranks.sum(numbers)
        print("all is well")
except Stopped as stopped:
    print("STOPPED", stopped)
