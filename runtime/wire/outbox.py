"""What is on its way to a peer, for senders that must never wait for it: an engine's loop, above all.

A thread of its own sends what a peer does not take at once. Knows nothing of what the bytes say.
"""

from __future__ import annotations

import threading
from collections import deque

from runtime.wire.connection import LENGTH, Connection
from runtime.wire.messages import WireError


class Outbox:
    """The frames for one connection, in order; nobody else may send on it. When the peer is gone, or leaves
    more than `limit` bytes unread, the connection is closed: whoever receives from it learns so. No limit is
    for senders that have one of their own."""

    def __init__(self, connection: Connection, limit: int | None = None):
        self._connection = connection
        self._limit = limit
        self._waiting: deque[memoryview] = deque()
        self._bytes = 0  # of what waits and of what the thread is sending
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="outbox", daemon=True).start()

    def put(self, frame: bytes) -> None:
        """Have the outbox's thread send a frame: the way for many small ones, each of which would hold the
        sender up for a call of the system. Never waits."""
        with self._changed:
            self._keep(memoryview(LENGTH.pack(len(frame)) + frame))

    def send(self, frame: bytes) -> None:
        """Send a frame from this thread as far as the peer's buffers take it, the rest by the other one:
        small frames go out with no change of threads. Never waits."""
        data = memoryview(LENGTH.pack(len(frame)) + frame)
        with self._changed:
            if self._closed:
                return
            if not self._bytes:
                try:
                    data = data[self._connection.write_now(data) :]
                except WireError:
                    self._close()
                    return
            if data:
                self._keep(data)

    def close(self) -> None:
        """Hang up. What still waits is dropped."""
        with self._changed:
            self._close()

    def _keep(self, data: memoryview) -> None:
        if self._closed:
            return
        if self._limit is not None and self._bytes + len(data) > self._limit:
            self._close()
            return
        self._waiting.append(data)
        self._bytes += len(data)
        self._changed.notify()

    def _close(self) -> None:
        self._closed = True
        self._waiting.clear()
        self._connection.close()  # wakes the thread if it is sending
        self._changed.notify()

    def _work(self) -> None:
        sent = 0
        while (data := self._next(sent)) is not None:
            try:
                self._connection.write(data)
            except WireError:
                self.close()
                return
            sent = len(data)

    def _next(self, sent: int) -> memoryview | None:
        """What to send after so many bytes, once there is something; None after the end."""
        with self._changed:
            self._bytes -= sent
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popleft() if self._waiting else None
