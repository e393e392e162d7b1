"""A pipe between stages that are processes: own connections for small tensors, torch.distributed for large.

A thread for each neighbour that sends takes in what comes, so that no sender waits for a receiver that
computes, and no two for each other. Tensors keep their order whichever way they come.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections import deque

import torch
import torch.distributed as dist

from runtime.cluster.mesh import Mesh
from runtime.cluster.peers import LARGE
from runtime.errors import Unavailable

HEADER = struct.calcsize("<q")  # bytes of the tensor that follows, int64
UNDER_WAY = 4  # large tensors that may be on their way to the next stage


class StagePipe:
    """This rank's end of the pipe through the ranks of the same units. See `runtime.model.pipe.Pipe`."""

    def __init__(self, mesh: Mesh, tp: int):
        """Ranks of the mesh count stage by stage, `tp` to each."""
        self._mesh = mesh
        self.stages = mesh.size // tp
        self.stage, within = divmod(mesh.rank, tp)
        self._at = [stage * tp + within for stage in range(self.stages)]  # the pipe's ranks
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()
        if self.stage > 0:
            self._arriving = self._listen(self._at[self.stage - 1])
        if not self.last:
            self._told = self._listen(self._at[-1])

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def send(self, x: torch.Tensor) -> None:
        self._send(self._at[self.stage + 1], x)

    def receive(self, count: int) -> torch.Tensor:
        x = _taken(self._arriving).view(torch.float32)
        if x.numel() != count:
            raise ValueError(f"stage {self.stage} was sent {x.numel()} numbers for {count}")
        return x

    def tell(self, tokens: torch.Tensor) -> None:
        for peer in self._at[:-1]:
            self._send(peer, tokens)

    def told(self, wait: bool) -> torch.Tensor | None:
        if not wait and self._told.empty():
            return None
        return _taken(self._told).view(torch.int64)

    def close(self) -> None:
        self._mesh.close()

    def _send(self, peer: int, tensor: torch.Tensor) -> None:
        payload = tensor.contiguous().view(-1).view(torch.uint8)
        header = torch.tensor([payload.numel()]).view(torch.uint8)
        if payload.numel() < LARGE:
            self._mesh.send(peer, torch.cat((header, payload)))
            return
        self._mesh.send(peer, header)
        self._under_way.append((self._mesh.send_large(peer, payload), payload))
        while len(self._under_way) > UNDER_WAY:
            self._mesh.finish(self._under_way.popleft()[0])

    def _listen(self, peer: int) -> queue.SimpleQueue:
        arriving: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            try:
                while True:
                    arriving.put(self._receive(peer))
            except Exception as error:  # whoever takes the next tensor has to know
                arriving.put(error)

        threading.Thread(target=work, name=f"from-rank-{peer}", daemon=True).start()
        return arriving

    def _receive(self, peer: int) -> torch.Tensor:
        """The next tensor's bytes, uint8."""
        size = int(self._mesh.receive(peer, HEADER).view(torch.int64))
        if size < LARGE:
            return self._mesh.receive(peer, size)
        payload = torch.empty(size, dtype=torch.uint8)
        self._mesh.finish(self._mesh.receive_large(peer, payload))
        return payload


def _taken(arriving: queue.SimpleQueue) -> torch.Tensor:
    value = arriving.get()
    if isinstance(value, Exception):
        arriving.put(value)  # for whoever asks again
        if isinstance(value, Unavailable):
            raise value
        raise Unavailable(f"a stage before or after is lost: {value}") from value
    return value
