"""What the engine's actor does without Ray: its class as it is, with a rank and gateways of this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

import runtime.cluster.actors as module
import runtime.cluster.step_channel
import runtime.wire.gateway_channel
from runtime.config import EngineConfig
from runtime.types import EngineInfo, Request, SamplingParams
from runtime.wire.connection import Connection
from runtime.wire.messages import Hello, WireError

TOKEN = "a secret"
INFO = EngineInfo("m", "numerics", 64, 100, 1, 1, 16, 8, 4)
LARGE = 24 << 20  # bytes, more than a connection's buffers hold
AT_ONCE = 60.0  # seconds for what is to happen at once: a loaded machine may stand still for several


@pytest.fixture
def left(monkeypatch) -> queue.SimpleQueue:
    """Has an entry once the process would end."""
    calls: queue.SimpleQueue = queue.SimpleQueue()
    monkeypatch.setattr(module, "_leave", lambda: calls.put(True))
    monkeypatch.setattr(module, "_spare_the_collector", lambda: None)
    # Nobody is lost for being late: the rank beats not at all, and its end is what a test makes it.
    monkeypatch.setattr(runtime.cluster.step_channel, "SILENCE_SECONDS", 600.0)
    monkeypatch.setattr(runtime.wire.gateway_channel, "STALLED_SECONDS", 600.0)
    return calls


@pytest.fixture
def engine(left) -> Iterator[tuple]:
    """An engine that welcomes gateways with a large message, and the other end of its only rank."""
    actor = module.EngineActor.__ray_metadata__.modified_class("127.0.0.1", TOKEN, 1)
    rank = Connection.connect(*actor.address(), Hello("rank", TOKEN, 0))
    actor.serve(EngineConfig(block_size=16, total_blocks=8), replace(INFO, model="m" * LARGE))
    yield actor, rank
    actor.stop()
    rank.close()


def gateway(actor) -> Connection:
    return Connection.connect(*actor.address(), Hello("gateway", TOKEN))


def test_a_gateway_that_does_not_read_keeps_no_dead_engine_alive(engine, left):
    """The process is to end, and another gateway hears of it after its requests' ends, all the same."""
    actor, rank = engine
    stuck, other = gateway(actor), gateway(actor)
    heard: list[str] = []

    def read() -> None:
        try:
            while heard[-1:] != ["lost"]:
                heard.append(other.receive()[0])
                if heard == ["welcome"]:
                    params = SamplingParams(max_tokens=5, temperature=0.0)
                    other.send("add", Request("r", (1, 2), params))
        except WireError:
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert rank.receive()[0] == "plan"
    assert stuck.detach().recv(4)  # so the engine knows both, and a request runs
    rank.close()
    assert left.get(timeout=AT_ONCE)
    reader.join(timeout=AT_ONCE)
    assert heard == ["welcome", "finished", "lost"]
    stuck.close()
    other.close()
