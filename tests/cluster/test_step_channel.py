"""The engine's end of the step channel over real sockets: ranks that do not read, are silent, or hang up."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

import runtime.cluster.step_channel as module
from runtime.cluster.step_channel import TcpRanks
from runtime.types import SampledToken, StepPlan, StepResult
from runtime.wire.connection import Connection, Listener
from runtime.wire.messages import Hello, WireError

TOKEN = "a secret"
SILENCE = 0.5  # seconds
LARGE = 1_200_000  # numbers: more bytes than the buffers of both ends hold
AT_ONCE = 5.0  # seconds that a loaded machine may take for what does not wait


def plan(step: int, numbers: int = 1) -> StepPlan:
    return StepPlan(step, (1 << 20,) * numbers, (), ())


@dataclass
class Group:
    """The engine's end, and the other ends of its connections: ranks that do what a test has them do."""

    channel: TcpRanks
    ranks: list[Connection]
    results: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    lost: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    still: list[threading.Event] = field(default_factory=list)

    def beat(self, rank: int) -> threading.Event:
        """Heartbeats, until the event is set."""
        ended = threading.Event()

        def run() -> None:
            try:
                while not ended.wait(SILENCE / 20):
                    self.ranks[rank].send("beat", 0)
            except WireError:
                return

        threading.Thread(target=run, daemon=True).start()
        self.still.append(ended)
        return ended


@pytest.fixture
def group(monkeypatch) -> Iterator[Group]:
    """Afterwards none of its threads is left."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", SILENCE)
    before = set(threading.enumerate())
    channel = TcpRanks(2)
    listener = Listener("127.0.0.1", TOKEN, channel.join)
    ranks = [Connection.connect(listener.host, listener.port, Hello("rank", TOKEN, n)) for n in range(2)]
    for connection in ranks:
        connection.detach().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    channel.wait_joined()
    made = Group(channel, ranks)
    for rank in range(2):
        made.beat(rank)
    channel.start(made.results.put, made.lost.put)
    yield made
    for ended in made.still:
        ended.set()
    channel.close()
    listener.close()
    for connection in ranks:
        connection.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=AT_ONCE)
        assert not thread.is_alive(), thread


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
    assert group.results.get(timeout=10) == StepResult(5, (SampledToken(3, 4),))
    assert group.lost.empty()


@pytest.mark.parametrize("size", [0, LARGE], ids=["idle", "amid a large plan"])
@pytest.mark.parametrize("how", ["is silent", "hangs up", "failed"])
def test_a_rank_that_is_gone_is_noticed(group, how, size):
    if size:
        threading.Thread(target=group.channel.submit, args=(plan(0, size),), daemon=True).start()
        time.sleep(0.1)
    if how == "is silent":
        group.still[0].set()
    elif how == "hangs up":
        group.ranks[0].close()
    else:
        group.ranks[0].send("failed", "a defect")
    said = group.lost.get(timeout=SILENCE + AT_ONCE)
    assert said.startswith("rank 0 is lost: ")
    assert {"is silent": "nothing was heard", "failed": "a defect"}.get(how, "") in said
    group.channel.submit(plan(1))  # which nobody waits for
