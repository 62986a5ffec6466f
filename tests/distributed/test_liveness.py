"""Ranks notice each other's end, silence and stall, on real sockets."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from together import free_ports
from waiting import DEADLINE_S, FOREVER_S, until

from localrl.distributed.launch import LaunchInfo
from localrl.distributed.liveness import LivenessChannel, LivenessTimeouts, meet
from localrl.errors import LocalRLError

QUICK = LivenessTimeouts(
    meet=DEADLINE_S,
    beat=0.05,
    silence=DEADLINE_S,
    stall=DEADLINE_S,
    waiting=DEADLINE_S,
    grace=DEADLINE_S,
)
"""No limit is reached by itself; what is late is made so by `FOREVER_S`."""


class Rank:
    """A channel, and what it was told."""

    def __init__(self, channel: LivenessChannel) -> None:
        self.channel = channel
        self.reasons: list[str] = []

    def watch(self) -> None:
        self.channel.watch(self.reasons.append, lambda: True)

    def die(self) -> None:
        """As when the process is killed: the kernel closes its sockets."""
        self.channel._closing.set()
        if self.channel._thread.ident is not None:
            self.channel._thread.join()
        for peer in self.channel._peers.values():
            peer.channel.close()


@pytest.fixture
def three():
    ranks = connect(QUICK)
    yield ranks
    for rank in reversed(ranks):
        if not rank.channel._closing.is_set():
            rank.channel.close(None)


def connect(limits: LivenessTimeouts, size: int = 3) -> list[Rank]:
    port = free_ports(1)
    places = [LaunchInfo(rank, size, "ring", "127.0.0.1", port) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [Rank(channel) for channel in pool.map(lambda place: meet(place, limits), places)]


def some_beats(rank, other, count=3):
    """Until so many signs of life of the other have been heard, and all but the last judged."""
    peer, heard = rank.channel._peers[other], set()

    def enough():
        heard.add(peer.heard)
        return len(heard) > count

    until(enough, "a sign of life")


def test_nobody_is_told_anything_while_all_is_well(three):
    for rank in three:
        rank.watch()
    for other in (1, 2):
        some_beats(three[0], other)
        some_beats(three[other], 0)
    assert [rank.reasons for rank in three] == [[], [], []]
    assert three[1].channel.reason(0.0) is None


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_is_told_to_all_others(three, dead):
    for rank in three:
        rank.watch()
    three[dead].die()
    for rank in three:
        if rank is not three[dead]:
            until(lambda rank=rank: rank.reasons)
            assert f"the death of rank {dead} (" in rank.reasons[0]
            assert rank.channel.reason(0.0) == rank.reasons[0]


def test_a_problem_is_told_in_its_own_words(three):
    for rank in three:
        rank.watch()
    three[2].channel.close("no model in /here")
    for rank in three[:2]:
        until(lambda rank=rank: rank.reasons)
        assert "rank 2 (" in rank.reasons[0]
        assert "no model in /here" in rank.reasons[0]


def test_a_goodbye_is_no_death(three):
    for rank in three:
        rank.watch()
    three[1].channel.close(None)
    three[2].channel.close(None)
    until(lambda: all(peer.gone for peer in three[0].channel._peers.values()))
    assert three[0].reasons == []


def test_silence():
    ranks = connect(QUICK, 2)
    ranks[0].channel._peers[1].heard -= FOREVER_S
    ranks[0].watch()  # the other says nothing, as when its machine sleeps
    until(lambda: ranks[0].reasons)
    assert "the silence of rank 1 (" in ranks[0].reasons[0]
    ranks[1].die()
    ranks[0].channel.close(None)


def test_a_stall_is_noticed_but_waiting_is_none():
    ranks = connect(QUICK, 2)
    ranks[0].channel.waits(True)  # for the other
    ranks[0].channel._moved -= FOREVER_S
    for rank in ranks:
        rank.watch()
    some_beats(ranks[1], 0)
    assert ranks[1].channel._peers[0].moved_s > DEADLINE_S
    assert ranks[0].reasons == ranks[1].reasons == []
    ranks[1].channel._moved -= FOREVER_S
    until(lambda: ranks[0].reasons)
    assert "a stall of rank 1 (" in ranks[0].reasons[0]
    until(lambda: ranks[1].reasons)
    for rank in reversed(ranks):
        rank.channel.close(None)


def test_all_waiting_for_each_other_is_a_deadlock():
    ranks = connect(QUICK, 2)
    for rank in ranks:
        rank.channel.waits(True)
        rank.channel._waiting -= FOREVER_S
        rank.watch()
    until(lambda: ranks[1].reasons)
    assert "a deadlock" in ranks[1].reasons[0]
    assert "4475" in ranks[1].reasons[0]
    for rank in reversed(ranks):
        rank.channel.close(None)


def test_one_that_does_not_come_is_named():
    place = LaunchInfo(0, 3, "ring", "127.0.0.1", free_ports(1))
    with pytest.raises(LocalRLError, match=r"within 0 s: \[1, 2\]"):
        meet(place, replace(QUICK, meet=0.2))


def test_rank_0_that_does_not_answer():
    place = LaunchInfo(1, 2, "ring", "127.0.0.1", free_ports(1))
    with pytest.raises(LocalRLError, match="Rank 0 did not answer"):
        meet(place, replace(QUICK, meet=0.3))


def test_an_address_of_another_machine():
    with pytest.raises(LocalRLError, match="must belong to this machine"):
        meet(LaunchInfo(0, 2, "ring", "192.0.2.1", free_ports(1)), QUICK)


def test_strangers_are_sent_away():
    port = free_ports(1)
    found: list[LivenessChannel] = []
    first = LaunchInfo(0, 2, "ring", "127.0.0.1", port)
    server = threading.Thread(target=lambda: found.append(meet(first, QUICK)))
    server.start()
    for words in (b"GET / HTTP/1.1\n", b'{"rank": 1, "size": 9}\n', b'{"rank": 0, "size": 2}\n'):
        stranger = None
        while stranger is None:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(words)
            assert stranger.recv(10) == b""
    second = meet(replace(first, rank=1), QUICK)
    server.join()
    found[0].close(None)
    second.close(None)
