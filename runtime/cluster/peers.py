"""The exchanges of the ranks of a stage: own TCP connections for small payloads, torch.distributed for large
ones.

A step of a small model is dozens of exchanges of a few kilobytes, where a TCP write and read between
processes of one host take about a tenth of what gloo takes; from a quarter of a megabyte on gloo wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from runtime.cluster.mesh import Mesh

LARGE = 256 * 1024  # bytes between a pair of ranks from which torch.distributed carries them
EAGER = 32 * 1024  # bytes that fit a socket's buffers, so that both ends may write before they read


class SocketCommunicator:
    """A `Communicator` whose ranks are processes, each connected to each."""

    def __init__(self, mesh: Mesh, first: int = 0, size: int | None = None):
        """The group of ranks first .. first + size - 1 of the mesh (None: of all), of which this is one."""
        self.mesh = mesh
        self.size = mesh.size if size is None else size
        self.rank = mesh.rank - first
        self.first = first

    def close(self) -> None:
        self.mesh.close()

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
        for work in pending:
            self.mesh.finish(work)
        return arrived

    def _large(self, peer: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[dist.Work]:
        works = []
        if outgoing.numel():
            works.append(self.mesh.send_large(self.first + peer, outgoing))
        if incoming.numel():
            works.append(self.mesh.receive_large(self.first + peer, incoming))
        return works

    def _send(self, peer: int, payload: torch.Tensor) -> None:
        self.mesh.send(self.first + peer, payload)

    def _receive(self, peer: int, size: int) -> torch.Tensor:
        return self.mesh.receive(self.first + peer, size)
