"""The engine's end of the step channel over real sockets: ranks that do not read, are silent, or hang up."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

import runtime.cluster.step_channel as module
from runtime.cluster.step_channel import TcpRanks
from runtime.types import SampledToken, StepPlan, StepResult
from runtime.wire.connection import TIMEVAL, Connection, Listener
from runtime.wire.messages import Hello, WireError

TOKEN = "a secret"
SILENCE = 0.5  # seconds
LARGE = 1_200_000  # numbers: more bytes than the buffers of both ends hold
AT_ONCE = 60.0  # seconds that a loaded machine may take for what does not wait


def plan(step: int, numbers: int = 1) -> StepPlan:
    return StepPlan(step, (1 << 20,) * numbers, (), ())


class Heart:
    """Heartbeats of a rank, until it is stopped."""

    def __init__(self, rank: Connection):
        self._rank = rank
        self._stopped = threading.Event()
        self._last = time.monotonic()
        self._longest = 0.0
        self._ended: float | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def pause(self) -> float:
        """The most seconds that passed without a beat, up to now or to the first that was not taken any more:
        a loaded machine may have held it up."""
        return max(self._longest, (self._ended or time.monotonic()) - self._last)

    def _run(self) -> None:
        try:
            while not self._stopped.wait(SILENCE / 20):
                begun = time.monotonic()
                self._rank.send("beat", 0)
                self._longest = max(self._longest, time.monotonic() - self._last)
                self._last = begun
        except WireError:
            self._ended = begun


@dataclass
class Group:
    """The engine's end, and the other ends of its connections: ranks that do what a test has them do."""

    channel: TcpRanks
    ranks: list[Connection]
    hearts: list[Heart]
    results: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    lost: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


@pytest.fixture
def group(monkeypatch, request) -> Iterator[Group]:
    """Afterwards none of its threads is left. A rank is lost for its silence only where a test is about that
    (`missed` as parameter): beats may be late on a loaded machine."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", SILENCE)
    before = set(threading.enumerate())
    channel = TcpRanks(2)
    listener = Listener("127.0.0.1", TOKEN, channel.join)
    ranks = [Connection.connect(listener.host, listener.port, Hello("rank", TOKEN, n)) for n in range(2)]
    for connection in ranks:
        connection.detach().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    channel.wait_joined()
    for rank, connection in channel._connections.items():
        if rank not in getattr(request, "param", ()):  # all but waiting for it is limited as ever
            connection.detach().setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(0, 0))
    made = Group(channel, ranks, [Heart(connection) for connection in ranks])
    channel.start(made.results.put, made.lost.put)
    yield made
    for heart in made.hearts:
        heart.stop()
    channel.close()
    listener.close()
    for connection in ranks:
        connection.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=AT_ONCE)
        assert not thread.is_alive(), thread


missed = pytest.mark.parametrize("group", [(0,)], indirect=True, ids=["rank 0"])


def test_a_rank_that_computes_for_long_is_not_waited_for_nor_lost(group):
    """It beats and reads nothing meanwhile; then it has every plan, whole and in order."""
    plans = [plan(0), plan(1, LARGE), plan(2), plan(3, LARGE // 2), plan(4)]
    started = time.monotonic()
    done = threading.Event()

    def submit() -> None:
        for each in plans:
            group.channel.submit(each)
        done.set()

    threading.Thread(target=submit, daemon=True).start()
    assert done.wait(AT_ONCE), "submit waits for a rank that does not read"
    time.sleep(max(0.0, 3 * SILENCE - (time.monotonic() - started)))
    assert group.lost.empty(), group.lost.get()
    for rank in (1, 0):  # whichever reads first
        assert [group.ranks[rank].receive()[1] for _ in plans] == plans
    group.channel.submit(plan(5))
    assert all(rank.receive() == ("plan", plan(5)) for rank in group.ranks)
    group.ranks[1].send("result", StepResult(5, (SampledToken(3, 4),)))
    assert group.results.get(timeout=AT_ONCE) == StepResult(5, (SampledToken(3, 4),))
    assert group.lost.empty()


@missed
def test_beats_are_all_that_is_asked_of_a_rank(group):
    time.sleep(3 * SILENCE)
    lost = not group.lost.empty()
    assert not lost or group.hearts[0].pause() >= SILENCE, group.lost.get()


def gone_is_noticed(group: Group, size: int, go: Callable[[], None], why: str) -> None:
    if size:
        threading.Thread(target=group.channel.submit, args=(plan(0, size),), daemon=True).start()
        time.sleep(0.1)
    go()
    said = group.lost.get(timeout=AT_ONCE)
    assert said.startswith("rank 0 is lost: ") and why in said
    group.channel.submit(plan(1))  # which nobody waits for


sizes = pytest.mark.parametrize("size", [0, LARGE], ids=["idle", "amid a large plan"])


@sizes
@missed
def test_a_rank_that_is_silent_is_noticed(group, size):
    gone_is_noticed(group, size, group.hearts[0].stop, "nothing was heard")


@sizes
@pytest.mark.parametrize("how", ["hangs up", "failed"])
def test_a_rank_that_is_gone_is_noticed(group, how, size):
    if how == "hangs up":
        gone_is_noticed(group, size, group.ranks[0].close, "")
    else:
        gone_is_noticed(group, size, lambda: group.ranks[0].send("failed", "a defect"), "a defect")
