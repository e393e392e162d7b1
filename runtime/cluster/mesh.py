"""What connects the ranks of a replica: a TCP connection for each pair, and torch.distributed among all.

A rank listens before anyone knows its address, and dials the ranks below it. Bytes arrive as they were sent;
what they mean is for those who send them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from runtime.errors import Unavailable
from runtime.wire.connection import Connection, Listener
from runtime.wire.messages import Hello, WireError

JOIN_SECONDS = 60.0
LEAVE_SECONDS = 20.0


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


class Mesh:
    """One rank's connections to all others."""

    def __init__(self, rank: int, addresses: Sequence[PeerAddress], listener: PeerListener, token: str):
        """Connect. gloo's ends meet in a file of rank 0's where all share a host, which `settled` takes away;
        else at a port of rank 0's, on the interface that they reach each other by. Raises Unavailable."""
        self.rank = rank
        self.size = len(addresses)
        self.one_host = len({address.host for address in addresses}) == 1
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
        if (name := _interface(addresses[rank].host)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo listens there and nowhere else
        try:
            dist.init_process_group(
                "gloo",
                store=self._file() if self.one_host else self._port(addresses[0].host),
                rank=rank,
                world_size=self.size,
                timeout=timedelta(seconds=JOIN_SECONDS),
            )
        except (RuntimeError, ValueError) as error:
            self.close()
            raise Unavailable(f"rank {rank}: gloo does not start: {_line(error)}") from None

    def close(self) -> None:
        # gloo's store looks for its file when it goes, and waits for minutes if the file goes at that very
        # moment. So a rank hangs up once its store has gone, and rank 0, whose file it is, waits for that.
        keeps = self._folder is not None
        if keeps:
            self._shut(socket.SHUT_WR)
        if dist.is_initialized():
            dist.destroy_process_group()
        if keeps:
            self._await_ends()
        self._shut(socket.SHUT_RDWR)
        for sock in self._socks.values():
            sock.close()
        self.settled()

    def _shut(self, how: int) -> None:
        for sock in self._socks.values():
            with contextlib.suppress(OSError):  # wakes a thread that reads, unless the peer hung up first
                sock.shutdown(how)

    def _await_ends(self) -> None:
        """Until every other rank has hung up, LEAVE_SECONDS at most."""
        until = time.monotonic() + LEAVE_SECONDS
        for sock in self._socks.values():
            with contextlib.suppress(OSError):
                while (left := until - time.monotonic()) > 0:
                    sock.settimeout(left)
                    if not sock.recv(1 << 16):
                        break

    def settled(self) -> None:
        """No more groups will be made: rank 0 takes the file away, which nothing needs any more, so that none
        is left whatever becomes of the rank."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def send(self, peer: int, payload: torch.Tensor) -> None:
        """Write the bytes of a contiguous host tensor, all of them."""
        try:
            self._socks[peer].sendall(payload.numpy())
        except OSError as error:
            raise Unavailable(f"rank {self.rank} lost rank {peer}: {error}") from None

    def receive(self, peer: int, size: int) -> torch.Tensor:
        """Wait for `size` bytes -> uint8 [size]."""
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

    def send_large(self, peer: int, payload: torch.Tensor) -> dist.Work:
        """Begin to send a tensor of at least a byte by torch.distributed; it is not to be changed before the
        work is waited for (`finish`)."""
        return self._begin(dist.isend, peer, payload)

    def receive_large(self, peer: int, into: torch.Tensor) -> dist.Work:
        """Begin to receive what the peer sends by `send_large`, of the same size."""
        return self._begin(dist.irecv, peer, into)

    def finish(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise Unavailable(f"rank {self.rank} lost a peer: {_line(error)}") from None

    def _begin(self, function, peer: int, tensor: torch.Tensor) -> dist.Work:
        try:
            return function(tensor, peer)
        except RuntimeError as error:
            raise Unavailable(f"rank {self.rank} lost rank {peer}: {_line(error)}") from None

    def _file(self) -> dist.Store:
        """A file of rank 0's, who makes its folder and tells the others where."""
        path = b""
        if self.rank == 0:
            self._folder = tempfile.mkdtemp(prefix="tramontane-")
            path = os.path.join(self._folder, "gloo").encode()
        return dist.FileStore(self._from_first(path).decode(), self.size)

    def _port(self, host: str) -> dist.Store:
        """A port of rank 0's, which no one but the ranks is told."""
        settings = {"timeout": timedelta(seconds=JOIN_SECONDS), "wait_for_workers": False}
        if self.rank == 0:
            listening = socket.create_server((host, 0))
            port = listening.getsockname()[1]
            self._from_first(str(port).encode())
            return dist.TCPStore(host, port, self.size, True, master_listen_fd=listening.detach(), **settings)
        return dist.TCPStore(host, int(self._from_first(b"")), self.size, False, **settings)

    def _from_first(self, text: bytes) -> bytes:
        """Rank 0's text, on every rank."""
        if self.rank == 0:
            for peer in range(1, self.size):
                self.send(peer, torch.tensor([len(text)]).view(torch.uint8))
                self.send(peer, torch.tensor(list(text), dtype=torch.uint8))
            return text
        size = int(self.receive(0, 8).view(torch.int64))
        return bytes(self.receive(0, size).tolist())


def _interface(host: str) -> str | None:
    """The network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    return None


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
