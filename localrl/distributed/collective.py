"""Collectives of several ranks: gather bytes, broadcast bytes of rank 0, sum numbers.

Each is an MLX collective on the CPU's stream, over evaluated arrays: on Metal's stream, mixed with
other work, collectives have been seen to hang (MLX issue 4475).
"""

from __future__ import annotations

import faulthandler
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from localrl.backend import mx
from localrl.distributed.launch import LaunchInfo
from localrl.distributed.liveness import LivenessChannel, LivenessTimeouts, meet
from localrl.errors import LocalRLError
from localrl.processes.heartbeat import Heartbeat

T = TypeVar("T")

LOST_S = 3.0
"""Seconds to wait until a lost connection is attributed to a rank."""
CHECK = 4
"""Number of checksum bytes that show whether data arrived intact."""


class Ranks:
    """This process among those that train together; alone it sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1, names: Sequence[str] = ("",)) -> None:
        self.rank, self.size, self.names = rank, size, names
        self.waited_s = 0.0
        """Seconds in which this rank has waited for the others, or for the network."""

    @property
    def is_main(self) -> bool:
        """True for the rank that writes, evaluates and logs."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of items that all ranks know: every size-th."""
        return list(items[self.rank :: self.size])

    def unshard(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """Merge the shares of all ranks, in the original order."""
        longest = max(map(len, shares))
        return [share[n] for n in range(longest) for share in shares if n < len(share)]

    def gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank, in the order of ranks."""
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        """Return the bytes of rank 0."""
        return data

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks, bitwise the same on each of them."""
        return array


ALONE = Ranks()


class Connected(Ranks):
    """A rank connected to others."""

    def __init__(self, place: LaunchInfo, channel: LivenessChannel, heartbeat: Heartbeat) -> None:
        super().__init__(place.rank, place.size)
        self._channel, self._heartbeat = channel, heartbeat
        self._group = _group(place, channel.limits.meet)
        if (self._group.rank(), self._group.size()) != (place.rank, place.size):
            raise LocalRLError(
                f"MLX says that this is rank {self._group.rank()} of {self._group.size()}, but the "
                f"environment says {place.rank} of {place.size}."
            )

    def gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank: gathers lengths first, then data padded to the
        longest."""
        size = len(data) + CHECK
        told = self._gathered(np.array([size, ~size], np.int32)).reshape(self.size, 2)
        self._insist(bool((told[:, 0] == ~told[:, 1]).all()))
        padded = np.zeros(int(told[:, 0].max()), np.uint8)
        padded[:size] = np.frombuffer(data + _check(data), np.uint8)
        rows = self._gathered(padded).reshape(self.size, -1)
        found = [row[:length].tobytes() for row, length in zip(rows, told[:, 0], strict=True)]
        self._insist(all(_check(row[:-CHECK]) == row[-CHECK:] for row in found))
        return [row[:-CHECK] for row in found]

    def broadcast(self, data: bytes) -> bytes:
        """Return the bytes of rank 0, as a sum to which the others add zeros."""
        length = int(self.sum(np.array([len(data) if self.is_main else 0], np.int32))[0])
        array = np.frombuffer(data, np.uint8) if self.is_main else np.zeros(length, np.uint8)
        return self.sum(array).tobytes() if length else b""

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks. MLX adds each part on one rank and sends it round."""
        with self._waiting():
            summed = mx.distributed.all_sum(mx.array(array), group=self._group, stream=mx.cpu)
            found = np.array(summed)
        checks = self.gather(_check(found.tobytes()))
        self._insist(checks == checks[:1] * self.size)
        return found

    def _gathered(self, array: np.ndarray) -> np.ndarray:
        with self._waiting():
            found = mx.distributed.all_gather(mx.array(array), group=self._group, stream=mx.cpu)
            return np.array(found)

    def _insist(self, whole: bool) -> None:
        """Check a result, since a rank that dies in the middle of a collective can leave others
        with a wrong one, which MLX (0.32) does not always report.

        Raises: Stopped if the data is not intact.
        """
        if not whole:
            self._lost("data from another rank was damaged")

    def _lost(self, what: str) -> None:
        for leftover in (mx.synchronize, lambda: mx.eval(mx.zeros(1) + 1)):
            # The stream may keep an error and raise it in the next operation, which is saving.
            with suppress(RuntimeError):
                leftover()
        self._heartbeat.stop(
            self._channel.reason(LOST_S) or f"a lost connection between the ranks: {what}"
        )
        self._heartbeat.beat()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Surround a collective with heartbeats and waiting marks.

        Raises: Stopped if a rank is gone. No collective may follow: it would hang.
        """
        self._heartbeat.beat()
        started = time.perf_counter()
        self._channel.waits(True)
        try:
            yield
        except RuntimeError as error:
            self._lost(str(error))
        finally:
            self._channel.waits(False)
            self.waited_s += time.perf_counter() - started
        self._heartbeat.beat()


@contextmanager
def join(
    place: LaunchInfo, limits: LivenessTimeouts | None = None
) -> Iterator[tuple[Ranks, Heartbeat]]:
    """Meet the other ranks, and watch them until the end of the context; yields the ranks and the
    heartbeat of this rank's run.

    Raises: LocalRLError if they do not come.
    """
    channel = meet(place, limits)
    heartbeat, problem = Heartbeat(channel.moved), None
    try:
        channel.watch(heartbeat.stop, lambda: heartbeat.noticed)
        ranks = Connected(place, channel, heartbeat)
        ranks.names = [name.decode() for name in ranks.gather(channel.name.encode())]
        yield ranks, heartbeat
    except BaseException as error:
        lines = str(error).splitlines() or [type(error).__name__]
        problem = heartbeat.reason if heartbeat.noticed else lines[0]
        raise
    finally:
        channel.close(problem)


def _group(place: LaunchInfo, limit_s: float) -> Any:
    """Return MLX's group of ranks; ends this process, with a traceback, if it takes too long.

    MLX waits without end for a neighbour that was killed after all had met, and holds Python's
    lock meanwhile: only a timer that needs no lock can end that.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        return mx.distributed.init(strict=True, backend=place.backend)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECK, "little")
