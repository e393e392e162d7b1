"""The ranks' exchanges: own TCP connections for small payloads, torch.distributed for large ones.

A step of a small model is dozens of exchanges of a few kilobytes, where a TCP write and read between
processes of one host take about a tenth of what gloo takes; from a quarter of a megabyte on gloo wins.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import Unavailable
from runtime.wire.connection import Connection, Listener
from runtime.wire.messages import Hello, WireError

LARGE = 256 * 1024  # bytes between a pair of ranks from which torch.distributed carries them
EAGER = 32 * 1024  # bytes that fit a socket's buffers, so that both ends may write before they read
JOIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class PeerAddress:
    host: str
    port: int


class PeerListener:
    """Where a rank waits for its peers, from before anyone knows its address."""

    def __init__(self, host: str, token: str):
        self._joined: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._listener = Listener(host, token, self._greet)
        self.address = PeerAddress(self._listener.host, self._listener.port)

    def _greet(self, hello: Hello, connection: Connection) -> None:
        with self._changed:
            self._joined[hello.rank] = connection.detach()
            self._changed.notify_all()

    def wait_for(self, ranks: Sequence[int]) -> dict[int, socket.socket]:
        """The connections of all `ranks`, each of which dials here. Raises Unavailable."""
        with self._changed:
            complete = self._changed.wait_for(lambda: all(r in self._joined for r in ranks), JOIN_SECONDS)
            if not complete:
                missing = [r for r in ranks if r not in self._joined]
                raise Unavailable(f"ranks {missing} did not join within {JOIN_SECONDS:.0f} s")
            self._listener.close()
            return {r: self._joined[r] for r in ranks}


class SocketCommunicator:
    """A `Communicator` whose ranks are processes, each connected to each."""

    def __init__(self, rank: int, addresses: Sequence[PeerAddress], listener: PeerListener, token: str):
        """Connect the mesh: a rank dials those below it. gloo's ends meet in a file of rank 0's, since a
        group's ranks share a host; `settled` takes it away."""
        self.rank = rank
        self.size = len(addresses)
        self._socks: dict[int, socket.socket] = {}
        self._folder: str | None = None
        try:
            for peer in range(rank):
                address = addresses[peer]
                hello = Hello("peer", token, rank)
                self._socks[peer] = Connection.connect(address.host, address.port, hello).detach()
        except WireError as error:
            raise Unavailable(f"rank {rank} cannot reach rank {peer}: {error}") from None
        self._socks |= listener.wait_for(range(rank + 1, self.size))
        if addresses[rank].host.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo listens there and nowhere else
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(self._meeting_place(), self.size),
            rank=rank,
            world_size=self.size,
            timeout=timedelta(seconds=JOIN_SECONDS),
        )

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.settled()

    def settled(self) -> None:
        """No more groups will be made: rank 0 takes the file away, which nothing needs any more, so that none
        is left whatever becomes of the rank."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _meeting_place(self) -> str:
        """A file's path: rank 0 makes its folder and tells the others."""
        if self.rank == 0:
            self._folder = tempfile.mkdtemp(prefix="tramontane-")
            path = os.path.join(self._folder, "gloo").encode()
            for peer in range(1, self.size):
                self._send(peer, torch.tensor([len(path)]).view(torch.uint8))
                self._send(peer, torch.tensor(list(path), dtype=torch.uint8))
            return path.decode()
        size = int(self._receive(0, 8).view(torch.int64))
        return bytes(self._receive(0, size).tolist()).decode()

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return self._swap([mine] * self.size, sizes)

    def all_to_all(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        return self._swap(outgoing, sizes)

    def gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
        if self.rank != 0:
            self._send(0, mine)
            return None
        return [mine, *(self._receive(peer, sizes[peer]) for peer in range(1, self.size))]

    def broadcast(self, payload: torch.Tensor | None, size: int) -> torch.Tensor:
        if payload is None:
            return self._receive(0, size)
        for peer in range(1, self.size):
            self._send(peer, payload)
        return payload

    def _swap(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send outgoing[p] to each peer p and receive sizes[p] bytes from it. Both ends of a pair see the
        same two sizes, and so choose the same way."""
        arrived = list(outgoing)
        peers = [peer for peer in range(self.size) if peer != self.rank]
        widest = {peer: max(outgoing[peer].numel(), sizes[peer]) for peer in peers}
        pending: list[dist.Work] = []
        for peer in peers:
            if widest[peer] > LARGE:
                arrived[peer] = torch.empty(sizes[peer], dtype=torch.uint8)
                pending += self._large(peer, outgoing[peer], arrived[peer])
            elif widest[peer] <= EAGER:
                self._send(peer, outgoing[peer])
        for peer in peers:
            if widest[peer] <= EAGER:
                arrived[peer] = self._receive(peer, sizes[peer])
            elif widest[peer] <= LARGE:
                # Neither end may write while the other does: the lower rank begins. Pairs are visited in
                # rising order on every rank, so the waits form no circle.
                if self.rank < peer:
                    self._send(peer, outgoing[peer])
                arrived[peer] = self._receive(peer, sizes[peer])
                if self.rank > peer:
                    self._send(peer, outgoing[peer])
        try:
            for work in pending:
                work.wait()
        except RuntimeError as error:
            raise Unavailable(f"rank {self.rank} lost a peer: {str(error).splitlines()[0]}") from None
        return arrived

    def _large(self, peer: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[dist.Work]:
        try:
            works = []
            if outgoing.numel():
                works.append(dist.isend(outgoing, peer))
            if incoming.numel():
                works.append(dist.irecv(incoming, peer))
            return [work for work in works if work is not None]
        except RuntimeError as error:
            raise Unavailable(f"rank {self.rank} lost rank {peer}: {str(error).splitlines()[0]}") from None

    def _send(self, peer: int, payload: torch.Tensor) -> None:
        try:
            self._socks[peer].sendall(payload.numpy())
        except OSError as error:
            raise Unavailable(f"rank {self.rank} lost rank {peer}: {error}") from None

    def _receive(self, peer: int, size: int) -> torch.Tensor:
        payload = torch.empty(size, dtype=torch.uint8)
        view = memoryview(payload.numpy())
        sock = self._socks[peer]
        while view:
            try:
                count = sock.recv_into(view)
            except OSError as error:
                raise Unavailable(f"rank {self.rank} lost rank {peer}: {error}") from None
            if count == 0:
                raise Unavailable(f"rank {self.rank} lost rank {peer}: it hung up")
            view = view[count:]
        return payload
