"""The engine's end of the step channel: plans out, results back, over one TCP connection a rank.

Ranks send heartbeats, two a second, whatever they compute. A rank that is silent for four seconds, or
hangs up, ends the group: a step cannot go on without any of its ranks, whatever their stage. A rank that
computes reads nothing meanwhile; what its connection does not take then waits here, in an outbox that holds
no more than the plans the engine has in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from runtime.errors import Unavailable
from runtime.types import StepPlan, StepResult
from runtime.wire.connection import Connection
from runtime.wire.messages import Hello, WireError, encode
from runtime.wire.outbox import Outbox

SILENCE_SECONDS = 4.0
JOIN_SECONDS = 120.0


class TcpRanks:
    """The engine's end: the `Ranks` of a loop whose ranks are other processes."""

    def __init__(self, ranks: int):
        self._ranks = ranks
        self._connections: dict[int, Connection] = {}
        self._outboxes: list[Outbox] = []
        self._changed = threading.Condition()
        self._closing = False
        self._on_lost: Callable[[str], None] = lambda detail: None

    def join(self, hello: Hello, connection: Connection) -> None:
        """Take a rank's connection, as the listener hands it over."""
        connection.set_timeout(SILENCE_SECONDS)
        with self._changed:
            self._connections[hello.rank] = connection
            self._changed.notify_all()

    def wait_joined(self) -> None:
        """Wait until all ranks are there. Raises Unavailable."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._connections) == self._ranks, JOIN_SECONDS):
                raise Unavailable(f"{len(self._connections)} of {self._ranks} ranks joined the step channel")

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        for rank, connection in self._connections.items():
            outbox = Outbox(connection)
            self._outboxes.append(outbox)
            threading.Thread(
                target=self._read,
                args=(rank, connection, outbox, on_result),
                name=f"rank-{rank}",
                daemon=True,
            ).start()

    def submit(self, plan: StepPlan) -> None:
        frame = encode("plan", plan)
        for outbox in self._outboxes:
            outbox.send(frame)  # if the rank is gone, its reader hears that too, and tells

    def close(self) -> None:
        self._closing = True
        for outbox in self._outboxes:
            outbox.close()
        for connection in self._connections.values():  # without outboxes, if nothing was started
            connection.close()

    def _read(
        self,
        rank: int,
        connection: Connection,
        outbox: Outbox,
        on_result: Callable[[StepResult], None],
    ) -> None:
        try:
            while True:
                kind, body = connection.receive()
                if isinstance(body, StepResult):
                    on_result(body)
                elif kind == "failed":
                    raise WireError(str(body))
        except WireError as error:
            outbox.close()
            if not self._closing:
                self._on_lost(f"rank {rank} is lost: {error}")
