"""A side channel for liveness: each rank learns at once when another one ends or hangs.

MLX waits in a collective without a timeout, and notices a dead process only when it sends to it. So
each rank holds a TCP connection to rank 0 and reports every second: when its run last moved, and
how long it has been waiting for the others. One JSON object per line:

    {"moved": 0.4, "waits": null}   status, in seconds
    {"end": "why"}                  request that all ranks end
    {"bye": true}                   this rank has finished
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localrl.distributed.launch import LaunchInfo
from localrl.errors import LocalRLError, Stopped

HELLO_S = 5.0
"""Seconds in which a connection must identify itself."""
LONGEST = 1 << 16
"""Longest message in bytes; a peer that sends more does not speak this protocol."""


@dataclass(frozen=True)
class LivenessTimeouts:
    """Timeouts in seconds."""

    meet: float = 60.0
    """Time until all ranks must have connected."""
    beat: float = 1.0
    """Time between two signs of life."""
    silence: float = 30.0
    """Time without a sign of life after which a machine counts as asleep or off the network."""
    stall: float = 900.0
    """Longest time without a decode call, micro-batch or reward call while not waiting."""
    waiting: float = 300.0
    """Longest time in which all ranks may wait for each other at once."""
    grace: float = 15.0
    """Time to leave a collective after a request to end; then the process is killed there."""


@dataclass
class _Peer:
    """The last known status of another rank."""

    name: str
    channel: socket.socket
    heard: float
    moved_s: float = 0.0
    waits_s: float | None = None
    gone: bool = False
    rest: bytes = b""


class LivenessChannel:
    """This rank's end of the channel; `meet` opens it, `watch` starts it, `close` ends it."""

    def __init__(
        self, place: LaunchInfo, peers: dict[int, _Peer], limits: LivenessTimeouts
    ) -> None:
        self.place, self.limits, self._peers = place, limits, peers
        self._moved = time.monotonic()
        self._waiting: float | None = None
        self._stop: Callable[[str], None] = lambda reason: None
        self._noticed: Callable[[], bool] = lambda: False
        self._told = threading.Event()
        self._told_at = 0.0
        self._reason = ""
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._selector = selectors.DefaultSelector()
        for rank, peer in peers.items():
            peer.channel.setblocking(False)
            self._selector.register(peer.channel, selectors.EVENT_READ, rank)

    @property
    def name(self) -> str:
        """Name of this machine."""
        return socket.gethostname()

    def watch(self, stop: Callable[[str], None], noticed: Callable[[], bool]) -> None:
        """Start sending and receiving, in a thread.

        stop: called with the reason when all ranks must end. noticed: returns True once this rank's
        run has begun to stop; if it does not in time, the process exits with what is on the disk.
        """
        self._stop, self._noticed = stop, noticed
        self._thread.start()

    def moved(self) -> None:
        """Record that the run has moved."""
        self._moved = time.monotonic()

    def waits(self, waiting: bool) -> None:
        """Record that the run starts or stops waiting for the others."""
        self._moved = time.monotonic()
        self._waiting = self._moved if waiting else None

    def reason(self, timeout: float) -> str | None:
        """Return why all ranks must end, if that is known or becomes known in time."""
        return self._reason if self._told.wait(timeout) else None

    def close(self, problem: str | None) -> None:
        """Send a goodbye, or this rank's problem, and wait a moment until it was read."""
        if problem is None or self._told.is_set():
            self._send_all({"bye": True})
        else:
            self._send_all({"end": f"rank {self.place.rank} ({self.name}): {problem}"})
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.channel.shutdown(socket.SHUT_WR)
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        for peer in self._peers.values():
            peer.channel.close()
        self._selector.close()

    def _watch(self) -> None:
        """Run the thread."""
        closing_until = float("inf")
        while time.monotonic() < closing_until and not self._all_gone():
            self._say_how_it_is()
            self._listen(time.monotonic() + self.limits.beat)
            if self._closing.is_set():
                closing_until = min(closing_until, time.monotonic() + self.limits.beat)
                continue
            self._judge(time.monotonic())
            self._insist(time.monotonic())

    def _all_gone(self) -> bool:
        return self._closing.is_set() and all(peer.gone for peer in self._peers.values())

    def _say_how_it_is(self) -> None:
        if not self._closing.is_set():
            now, waiting = time.monotonic(), self._waiting
            waits = None if waiting is None else now - waiting
            self._send_all({"moved": now - self._moved, "waits": waits})

    def _listen(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0 and self._selector.get_map():
            for key, _ in self._selector.select(min(left, 0.1)):
                self._read(key.data, self._peers[key.data])
            if self._closing.is_set():
                return
        if not self._selector.get_map():
            self._closing.wait(max(0.0, until - time.monotonic()))

    def _read(self, rank: int, peer: _Peer) -> None:
        try:
            data = peer.channel.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        try:
            for line in lines:
                self._hear(rank, peer, json.loads(line))
        except (ValueError, LookupError, TypeError):  # a partial message before the peer died
            data = b""
        if not data:
            self._selector.unregister(peer.channel)
            if not peer.gone:
                peer.gone = True
                self._end(f"the death of {_named(rank, peer)}")

    def _hear(self, rank: int, peer: _Peer, message: dict[str, Any]) -> None:
        peer.heard = time.monotonic()
        if "moved" in message:
            peer.moved_s, peer.waits_s = message["moved"], message["waits"]
        if "bye" in message:
            peer.gone = True
        if "end" in message:
            peer.gone = True
            self._end(message["end"])

    def _judge(self, now: float) -> None:
        """End all ranks if one is silent or does not move, or if all wait for each other."""
        limits, here = self.limits, [peer for peer in self._peers.values() if not peer.gone]
        for rank, peer in self._peers.items():
            if peer.gone:
                continue
            if now - peer.heard > limits.silence:
                self._end(
                    f"the silence of {_named(rank, peer)}: nothing for {now - peer.heard:.0f} s; "
                    "it is asleep or off the network"
                )
            elif peer.waits_s is None and peer.moved_s > limits.stall:
                self._end(f"a stall of {_named(rank, peer)}: no progress for {peer.moved_s:.0f} s")
        waits = [0.0 if peer.waits_s is None else peer.waits_s for peer in here]
        waits.append(0.0 if self._waiting is None else now - self._waiting)
        if here and self.place.rank == 0 and min(waits) > limits.waiting:
            self._end(
                f"a deadlock: all ranks have waited for each other for {min(waits):.0f} s "
                "(MLX issue 4475)"
            )

    def _end(self, reason: str) -> None:
        if not self._told.is_set():
            self._reason, self._told_at = reason, time.monotonic()
            self._told.set()
            self._send_all({"end": reason})
            self._stop(reason)

    def _insist(self, now: float) -> None:
        """Exit the process if its run does not stop: it may be waiting for a rank that is gone."""
        if not self._told.is_set() or self._noticed():
            return
        waiting, limits = self._waiting, self.limits
        # Outside a collective the run is working, and will reach its next beat.
        late_s = limits.stall if waiting is None else limits.grace
        if now - max(self._told_at, waiting or 0.0) > late_s:
            print(
                f"\nlocalrl: rank {self.place.rank} was stopped by {self._reason}, but hangs. "
                "It exits with what is on the disk; --resume continues from there.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(Stopped.exit_code)

    def _send_all(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self._peers.values():
                # A full buffer loses a sign of life; a peer that does not read soon seems silent.
                with contextlib.suppress(OSError):
                    peer.channel.send(data)


def meet(place: LaunchInfo, limits: LivenessTimeouts | None = None) -> LivenessChannel:
    """Connect all ranks with rank 0.

    Raises: LocalRLError if one of them does not come in time, or the port is not available.
    """
    limits = limits or LivenessTimeouts()
    gather = _wait_for_others if place.rank == 0 else _call_first
    return LivenessChannel(place, gather(place, limits), limits)


def _wait_for_others(place: LaunchInfo, limits: LivenessTimeouts) -> dict[int, _Peer]:
    address = f"{place.host}:{place.port}"
    try:
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        server = socket.create_server((place.host, place.port), family=family)
    except OSError as error:
        raise LocalRLError(
            f"Rank 0 cannot listen on {address} ({error.strerror}). Its address must belong to "
            "this machine; choose another port with mlx.launch --starting-port."
        ) from error
    peers: dict[int, _Peer] = {}
    deadline = time.monotonic() + limits.meet
    with server:
        while len(peers) < place.size - 1:
            missing = sorted({*range(1, place.size)} - {*peers})
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                channel, _ = server.accept()
            except TimeoutError:
                raise LocalRLError(
                    f"Of {place.size} ranks these did not connect to {address} within "
                    f"{limits.meet:.0f} s: {missing}. Check the output on their machines, and "
                    "that they can reach that address."
                ) from None
            hello = _receive(channel, HELLO_S)
            if hello.get("rank") in missing and hello.get("size") == place.size:
                peers[hello["rank"]] = _Peer(str(hello.get("name")), channel, 0.0)
            else:  # not a rank of this run
                channel.close()
    for peer in peers.values():
        peer.channel.sendall(json.dumps({"name": socket.gethostname()}).encode() + b"\n")
        peer.heard = time.monotonic()
    return peers


def _call_first(place: LaunchInfo, limits: LivenessTimeouts) -> dict[int, _Peer]:
    deadline = time.monotonic() + limits.meet
    hello = {"rank": place.rank, "size": place.size, "name": socket.gethostname()}
    while True:
        left = max(0.01, deadline - time.monotonic())
        with contextlib.suppress(OSError):
            channel = socket.create_connection((place.host, place.port), timeout=left)
            channel.sendall(json.dumps(hello).encode() + b"\n")
            answer = _receive(channel, deadline - time.monotonic())
            if "name" in answer:
                return {0: _Peer(answer["name"], channel, time.monotonic())}
            channel.close()
        if time.monotonic() >= deadline:
            raise LocalRLError(
                f"Rank 0 did not answer at {place.host}:{place.port} within {limits.meet:.0f} s. "
                "Check the output on its machine, and that this one can reach that address."
            )
        time.sleep(0.1)


def _receive(channel: socket.socket, timeout: float) -> dict[str, Any]:
    """Receive one message; empty if there is none."""
    channel.settimeout(max(0.01, timeout))
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < LONGEST:
            piece = channel.recv(1)
            if not piece:
                break
            data += piece
        message = json.loads(data)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _named(rank: int, peer: _Peer) -> str:
    return f"rank {rank} ({peer.name})"
