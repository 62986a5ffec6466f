"""Ranks notice each other's end, silence and stall, on real sockets."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from together import free_ports

from localrl.errors import LocalRLError
from localrl.ranks.line import Limits, Line, meet
from localrl.ranks.place import Place

QUICK = Limits(meet=5.0, beat=0.05, silence=60.0, stall=60.0, waiting=60.0, grace=60.0)


class Rank:
    """A line, and what it was told."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.reasons: list[str] = []

    def watch(self) -> None:
        self.line.watch(self.reasons.append, lambda: True)

    def die(self) -> None:
        """As when the process is killed: the kernel closes its sockets."""
        self.line._closing.set()
        if self.line._thread.ident is not None:
            self.line._thread.join()
        for peer in self.line._peers.values():
            peer.channel.close()


@pytest.fixture
def three():
    ranks = connect(QUICK)
    yield ranks
    for rank in reversed(ranks):
        if not rank.line._closing.is_set():
            rank.line.close(None)


def connect(limits: Limits, size: int = 3) -> list[Rank]:
    port = free_ports(1)
    places = [Place(rank, size, "ring", "127.0.0.1", port) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [Rank(line) for line in pool.map(lambda place: meet(place, limits), places)]


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_nobody_is_told_anything_while_all_is_well(three):
    for rank in three:
        rank.watch()
    time.sleep(0.3)
    assert [rank.reasons for rank in three] == [[], [], []]
    assert three[1].line.reason(0.0) is None


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_is_told_to_all_others(three, dead):
    for rank in three:
        rank.watch()
    three[dead].die()
    for rank in three:
        if rank is not three[dead]:
            wait_for(lambda rank=rank: rank.reasons)
            assert f"the death of rank {dead} (" in rank.reasons[0]
            assert rank.line.reason(0.0) == rank.reasons[0]


def test_a_problem_is_told_in_its_own_words(three):
    for rank in three:
        rank.watch()
    three[2].line.close("no model in /here")
    for rank in three[:2]:
        wait_for(lambda rank=rank: rank.reasons)
        assert "rank 2 (" in rank.reasons[0]
        assert "no model in /here" in rank.reasons[0]


def test_a_goodbye_is_no_death(three):
    for rank in three:
        rank.watch()
    three[1].line.close(None)
    three[2].line.close(None)
    time.sleep(0.2)
    assert three[0].reasons == []


def test_silence():
    ranks = connect(replace(QUICK, silence=0.3), 2)
    ranks[0].watch()  # the other says nothing, as when its machine sleeps
    wait_for(lambda: ranks[0].reasons)
    assert "the silence of rank 1 (" in ranks[0].reasons[0]
    ranks[1].die()
    ranks[0].line.close(None)


def test_a_stall_is_noticed_but_waiting_is_none():
    ranks = connect(replace(QUICK, stall=0.4), 2)
    for rank in ranks:
        rank.watch()
    ranks[0].line.waits(True)  # for the other
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        ranks[1].line.moved()
        time.sleep(0.02)
    assert ranks[0].reasons == ranks[1].reasons == []
    wait_for(lambda: ranks[0].reasons)
    assert "a stall of rank 1 (" in ranks[0].reasons[0]
    wait_for(lambda: ranks[1].reasons)
    for rank in reversed(ranks):
        rank.line.close(None)


def test_all_waiting_for_each_other_is_a_deadlock():
    ranks = connect(replace(QUICK, waiting=0.4), 2)
    for rank in ranks:
        rank.watch()
        rank.line.waits(True)
    wait_for(lambda: ranks[1].reasons)
    assert "a deadlock" in ranks[1].reasons[0]
    assert "4475" in ranks[1].reasons[0]
    for rank in reversed(ranks):
        rank.line.close(None)


def test_one_that_does_not_come_is_named():
    place = Place(0, 3, "ring", "127.0.0.1", free_ports(1))
    with pytest.raises(LocalRLError, match=r"within 0 s: \[1, 2\]"):
        meet(place, replace(QUICK, meet=0.2))


def test_rank_0_that_does_not_answer():
    place = Place(1, 2, "ring", "127.0.0.1", free_ports(1))
    with pytest.raises(LocalRLError, match="Rank 0 does not answer"):
        meet(place, replace(QUICK, meet=0.3))


def test_an_address_of_another_machine():
    with pytest.raises(LocalRLError, match="must be one of this machine's"):
        meet(Place(0, 2, "ring", "192.0.2.1", free_ports(1)), QUICK)


def test_strangers_are_sent_away():
    port = free_ports(1)
    found: list[Line] = []
    first = Place(0, 2, "ring", "127.0.0.1", port)
    server = threading.Thread(target=lambda: found.append(meet(first, QUICK)))
    server.start()
    for words in (b"GET / HTTP/1.1\n", b'{"rank": 1, "size": 9}\n', b'{"rank": 0, "size": 2}\n'):
        stranger = None
        while stranger is None:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(words)
            assert stranger.recv(10) == b""
    second = meet(replace(first, rank=1), QUICK)
    server.join()
    found[0].close(None)
    second.close(None)
